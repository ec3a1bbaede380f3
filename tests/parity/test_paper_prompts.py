"""The prompts of the paper's code, byte for byte."""

import golden_data
import pytest
from transformers import ProcessorMixin

from trl_llava.data.load import rows_from
from trl_llava.prompts import JudgingPrompt, Message, judging_messages, render

MODES = {"fact": True, "plain_with_captions": False, "plain": False}
"""The judging prompts of the set: whether the captions are shown."""


def judged(conversation: list[Message], order: list[str], with_captions: bool) -> list[Message]:
    """The judging turn with the captions in a given order."""
    prompt = JudgingPrompt(with_captions=with_captions)
    *before, question, answer = judging_messages(conversation, order or None, prompt)
    text = prompt.text(order if with_captions else [])
    return [*before, {**question, "content": [{"type": "text", "text": text}]}, answer]


def test_conversations(processor: ProcessorMixin, variant: str) -> None:
    compared = 0
    for name, case in golden_data.read("1_sft.json")["cases"].items():
        if "prompt" not in case[variant]:
            continue
        (row,) = rows_from(golden_data.rows([{"conversations": case["conversations"]}]), "sft")
        assert render(processor, [*row["prompt"], *row["completion"]]) == case[variant]["prompt"], name
        compared += 1
    assert compared > 5


def test_queries(processor: ProcessorMixin, variant: str) -> None:
    golden = golden_data.read("1_ppo_queries.json")
    dataset = rows_from(golden_data.rows(golden["data"]), "prompt")
    for cases in golden["query_len"].values():
        for row, prompt in zip(dataset, cases[variant]["prompts"], strict=True):
            # The original renders an empty answer and cuts the ids off where it begins.
            assert render(processor, row["prompt"], add_generation_prompt=True) + " \n</s>" == prompt


@pytest.mark.parametrize("mode", MODES)
def test_judging_turn(processor: ProcessorMixin, variant: str, mode: str) -> None:
    golden = golden_data.read("1_rm.json")
    dataset = rows_from(golden_data.rows(golden["data"]), "preference")
    for record, row, item in zip(golden["data"], dataset, golden["modes"][mode][variant]["items"], strict=True):
        answers = ("chosen", "rejected") if record["preference"] == 1 else ("rejected", "chosen")
        orders = item["caption_orders"] or [[], []]
        for answer, order, prompt in zip(answers, orders, item["prompts"], strict=True):
            messages = judged([*row["prompt"], *row[answer]], order, MODES[mode])
            text = render(processor, messages, continue_final_message=True, judging_turn=True)
            assert text + "</s>" == prompt  # which the original takes off again as an id


@pytest.mark.parametrize("mode", MODES)
def test_judging_prompt_is_the_one_of_the_paper(mode: str, variant: str) -> None:
    prompt = JudgingPrompt()
    instruction = prompt.instruction if MODES[mode] else prompt.text([])
    published = golden_data.read("1_rm.json")["modes"][mode][variant]["reward_model_prompt"]
    assert published == f" USER: {instruction} ASSISTANT: {prompt.answer_prefix}"
