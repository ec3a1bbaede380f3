"""What holds for any text in any script, any number of turns and pictures, any padding.

Text is drawn from all of Unicode, mixed with every special token and role marker there is: what a user writes is text.
`TRL_LLAVA_EXAMPLES=10 pytest tests/test_properties.py` draws ten times as many examples (the `slow` test does).
"""

import functools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from trl_llava.data.batching import pad
from trl_llava.data.collators import PromptCollator, SFTCollator
from trl_llava.data.contract import ANSWER_TYPES, COMPLETIONS, stage_features
from trl_llava.data.formats import KNOWN_COLUMNS
from trl_llava.data.load import load_rows
from trl_llava.data.preference_collators import DPOCollator, PreferenceCollator
from trl_llava.data.row_maker import RowMaker
from trl_llava.errors import ExplainedError
from trl_llava.prompts import JUDGING_ANSWER_PREFIX, JudgingPrompt, judging_messages, message_text
from trl_llava.rewards.reward_terms import correctness, length_term, missing_eos

SCALE = int(os.environ.get("TRL_LLAVA_EXAMPLES", "1"))
IMAGE_TOKENS = 16


def examples(count: int) -> settings:
    return settings(
        max_examples=count * SCALE,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


# --- processors ------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{% if not (continue_final_message and loop.last) %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def processor(kind: str) -> LlavaProcessor:
    """Llama's kind of tokenizer with vicuna_v1, or Qwen's with ChatML."""
    tokenizer = tiny_models.tiny_tokenizer() if kind == "llama" else byte_level_tokenizer()
    images = LlavaImageProcessorPil(size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4})
    made = LlavaProcessor(images, tokenizer, patch_size=1, vision_feature_select_strategy="full")
    made.chat_template = tokenizer.chat_template
    return made


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a byte; no character is lost, and many are several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<image>", "<|im_start|>"],
    )
    fast.add_tokens(["<tool_call>"])  # an added token that is not a special one
    fast.chat_template = CHATML
    return fast


def special_ids(tokenizer: Any) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}


# --- what is drawn ---------------------------------------------------------------------------------------------------

MARKUP = [
    *["<image>", "</s>", "<s>", "<pad>", "<unk>", "<video>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    *["USER:", " USER: ", "ASSISTANT:", " ASSISTANT: ", "<|im_start|>assistant\n", "</s>USER: ", "<tool_call>"],
    *["{caption}", "{factual_prompt}", "{{ eos_token }}", "{% endfor %}", "  - a caption\n", "\n", "  ", "▁", "\t"],
    *[
        "<im",
        "age>",
        "\U000f0000",
        "\U000f0001",
        "\ufeff",
        "\u200f",
        "\u202e",
        "e\u0301",
        "\U0001f468\u200d\U0001f469",
    ],
    *["Following your definitions, the quality score of my last response is"],
]
texts = st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=6)), max_size=5).map("".join)
said = texts.filter(str.strip)
kinds = st.sampled_from(["llama", "chatml"])


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@st.composite
def rows(draw: st.DrawFn, stage: str = "sft") -> dict[str, Any]:
    """A row of the contract: one to three questions, up to three pictures in any of them."""
    images: list[Any] = []
    prompt = [{"role": "system", "content": [part(draw(said))]}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        if turn:
            prompt.append({"role": "assistant", "content": [part(draw(said))]})
        shown = draw(st.integers(0, 2)) if len(images) < 2 else 0
        images += [picture(draw(st.integers(0, 255))) for _ in range(shown)]
        prompt.append({"role": "user", "content": [{"type": "image", "text": None}] * shown + [part(draw(said))]})
    row = {"row_name": f"row[{draw(st.integers(0, 999))}]", "images": images, "prompt": prompt}
    for name in COMPLETIONS[stage]:
        row[name] = [{"role": "assistant", "content": [part(draw(said))]}]
    if stage != "sft":
        row["captions"] = draw(st.lists(said, min_size=1, max_size=4))
    return row


def picture(shade: int) -> Any:
    return tiny_models.Image.new("RGB", (5, 4), (shade, 255 - shade, 7))


def collators(kind: str, stage: str) -> list[Any]:
    made = processor(kind)
    if stage == "sft":
        return [SFTCollator(made), SFTCollator(made, labels_on="completion", pad_to_multiple_of=8)]
    if stage == "prompt":
        return [PromptCollator(made)]
    judged = PreferenceCollator(made, judging_prompt=JudgingPrompt())
    return [judged, PreferenceCollator(made, pad_to_multiple_of=8), DPOCollator(made)]


def real(batch: dict[str, Any], i: int, name: str = "input_ids") -> list[int]:
    """The values of a row that are not padding."""
    return batch[name][i][batch["attention_mask"][i] == 1].tolist()


# --- collators -------------------------------------------------------------------------------------------------------


@examples(20)
@given(kinds, st.lists(rows(), min_size=1, max_size=3))
def test_labels_are_the_answers_and_their_ends(kind: str, drawn: list[dict[str, Any]]) -> None:
    tokenizer = processor(kind).tokenizer
    for collator in collators(kind, "sft"):
        batch = collator(drawn)
        for i, row in enumerate(drawn):
            labels = batch["labels"][i][batch["labels"][i] != -100].tolist()
            learned, answer = [], []
            for token in labels:
                if token == tokenizer.eos_token_id:
                    learned.append(tokenizer.decode(answer))
                    answer = []
                else:
                    answer.append(token)
            assert not answer
            turns = [turn for turn in [*row["prompt"], *row["completion"]] if turn["role"] == "assistant"]
            expected = [message_text(turn) for turn in turns]
            if collator.labels_on == "completion":
                expected = expected[-1:]
            assert [same(text) for text in learned] == [same(text) for text in expected]


def same(text: str) -> str:
    """Llama's tokenizer writes a space as ▁ and gives the first one back to the word."""
    return text.replace("▁", " ").strip(" ")


@pytest.mark.parametrize("stage", COMPLETIONS)
@examples(20)
@given(kinds, st.data())
def test_special_tokens_are_the_templates_own(stage: str, kind: str, data: st.DataObject) -> None:
    """No text of a user becomes a special token, and no image token is lost."""
    drawn = data.draw(st.lists(rows(stage), min_size=1, max_size=3))
    made = processor(kind)
    tokenizer = made.tokenizer
    for collator in collators(kind, stage):
        batch = collator(drawn)
        for i in range(len(batch["input_ids"])):
            row = drawn[i % len(drawn)]
            messages = collator.conversations(row)[i // len(drawn)]
            ids = real(batch, i)
            found = {token: ids.count(token) for token in special_ids(tokenizer) if token in ids}
            assert found == expected_specials(made, kind, row, messages, collator)
    assert len(batch.get("pixel_values", [])) >= sum(len(row["images"]) for row in drawn)


def expected_specials(
    made: Any, kind: str, row: dict[str, Any], messages: list[dict[str, Any]], collator: Any
) -> dict[int, int]:
    open_end = collator.rendering().get("continue_final_message", False)
    asked = collator.rendering().get("add_generation_prompt", False)
    roles = [message["role"] for message in messages]
    id_of = made.tokenizer.convert_tokens_to_ids
    expected = {made.image_token_id: IMAGE_TOKENS * len(row["images"])}
    if kind == "llama":
        expected |= {id_of("<s>"): 1, id_of("</s>"): roles.count("assistant") - open_end}
    else:
        expected |= {id_of("<|im_end|>"): len(roles) - open_end, id_of("<|im_start|>"): len(roles) + asked}
    return {token: count for token, count in expected.items() if count}


@pytest.mark.parametrize("stage", COMPLETIONS)
@examples(8)
@given(kinds, st.data())
def test_a_row_does_not_depend_on_its_batch(stage: str, kind: str, data: st.DataObject) -> None:
    """Permuting a batch permutes the result, and a row alone is the row in the batch without its padding."""
    drawn = data.draw(st.lists(rows(stage), min_size=2, max_size=4))
    order = data.draw(st.permutations(range(len(drawn))))
    for collator in collators(kind, stage):
        whole, moved = collator(drawn), collator([drawn[i] for i in order])
        copies = len(whole["input_ids"]) // len(drawn)
        assert whole["input_ids"].shape == moved["input_ids"].shape
        names = [name for name in ("input_ids", "labels", "completion_mask") if name in whole]
        for place, i in enumerate(order):
            alone = collator([drawn[i]])
            for copy in range(copies):
                at, before = place + copy * len(drawn), i + copy * len(drawn)
                for name in names:
                    assert torch.equal(moved[name][at], whole[name][before])
                    assert real(alone, copy, name) == real(whole, before, name)
        if any(row["images"] for row in drawn):
            pictures = dict(zip(range(len(drawn)), split(whole["pixel_values"], drawn), strict=True))
            permuted = split(moved["pixel_values"], [drawn[i] for i in order])
            assert all(torch.equal(permuted[place], pictures[i]) for place, i in enumerate(order))


def split(pixels: torch.Tensor, drawn: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The pictures of each row; DPO's batches hold them twice."""
    counts = [len(row["images"]) for row in drawn]
    return list(pixels[: sum(counts)].split(counts))


@examples(15)
@given(kinds, st.lists(rows("preference"), min_size=1, max_size=3), st.booleans())
def test_a_packed_pair_is_the_pair(kind: str, drawn: list[dict[str, Any]], judged: bool) -> None:
    """What both answers have in common, then either's own part, are the ids of that answer's conversation."""
    prompt = JudgingPrompt() if judged else None
    apart = PreferenceCollator(processor(kind), judging_prompt=prompt)(drawn)
    packed = PreferenceCollator(processor(kind), judging_prompt=prompt, share_prefix=True)(drawn)
    for i in range(len(drawn)):
        ids, segments = real(packed, i), real(packed, i, "segments")
        for answer, row in ((1, i), (2, len(drawn) + i)):
            own = [token for token, segment in zip(ids, segments, strict=True) if segment in (0, answer)]
            assert own == real(apart, row)
    assert ("pixel_values" in apart) == ("pixel_values" in packed)
    assert "pixel_values" not in apart or torch.equal(apart["pixel_values"], packed["pixel_values"])


@examples(30)
@given(
    st.lists(st.lists(st.integers(-100, 999), max_size=9), min_size=1, max_size=5), st.integers(1, 8), st.booleans()
)
def test_padding_keeps_every_value_in_its_place(values: list[list[int]], multiple: int, left: bool) -> None:
    padded = pad(values, -7, side="left" if left else "right", multiple=multiple)
    assert padded.shape[1] % multiple == 0
    assert padded.shape[1] - max(map(len, values)) < multiple
    for row, given_ in zip(padded.tolist(), values, strict=True):
        gap = [-7] * (len(row) - len(given_))
        assert row == (gap + given_ if left else given_ + gap)


# --- prompts ---------------------------------------------------------------------------------------------------------


@examples(30)
@given(rows("preference"), st.randoms(use_true_random=False), st.integers(0, 3))
def test_the_judging_turn_holds_every_caption_as_text(row: dict[str, Any], chance: random.Random, seed: int) -> None:
    prompt = JudgingPrompt(seed=seed)
    chosen = judging_messages([*row["prompt"], *row["chosen"]], row["captions"], prompt)
    shuffled = chance.sample(row["captions"], len(row["captions"]))
    rejected = judging_messages([*row["prompt"], *row["rejected"]], shuffled, prompt)
    assert chosen[-2:] == rejected[-2:]
    assert message_text(chosen[-1]) == JUDGING_ANSWER_PREFIX
    assert chosen[: len(row["prompt"]) + 1] == [*row["prompt"], *row["chosen"]]
    asked = message_text(chosen[-2])
    plain = prompt.text([])
    start = asked.index("captions:\n") + len("captions:\n")
    lines = asked[start:]
    for caption in sorted(row["captions"], key=len, reverse=True):
        assert f"  - {caption}\n" in lines
    added = len(asked) - len(plain) - sum(len(f"  - {caption}\n") for caption in row["captions"])
    assert added == len(" " + prompt.factual_header)


@examples(20)
@given(kinds, rows("preference"))
def test_the_score_is_read_where_the_judgement_begins(kind: str, row: dict[str, Any]) -> None:
    """Whatever captions and answers say, the last token is that of the template's judgement, for both of a pair."""
    made = processor(kind)
    batch = PreferenceCollator(made, judging_prompt=JudgingPrompt())([row])
    chosen, rejected = (real(batch, i) for i in (0, 1))
    tail = made.tokenizer(" is", add_special_tokens=False)["input_ids"][-1]
    assert chosen[-1] == rejected[-1] == tail
    assert made.tokenizer.decode(chosen).endswith(JUDGING_ANSWER_PREFIX)


# --- row loaders -----------------------------------------------------------------------------------------------------

# Half a surrogate pair can be written in JSON, and is no text; nor does every number or file name fit everywhere.
scalars = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | texts
scalars |= st.sampled_from([10**400, 2**70, "\ud800", "a\x00.png", "a" * 300 + ".png", "[" * 5000, "9" * 5000])
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
content = texts | st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "video"])}, optional={"text": texts | scalars}),
    max_size=3,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": content}),
    max_size=3,
)
turns = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "bot"]), "value": texts | scalars}),
    max_size=4,
)
NEARLY_RIGHT: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("messages", "prompt", "completion", "chosen", "rejected"), messages),
    "conversations": turns,
    **dict.fromkeys(("output_1", "output_2"), turns.map(lambda drawn: drawn[0] if drawn else None)),
    "preference": st.sampled_from([1, 2, 3, True, "1"]),
    "captions": st.lists(texts, max_size=3),
    "answer_type": st.sampled_from([*ANSWER_TYPES, "E"]),
    **dict.fromkeys(("length_multiplier", "length_bonus", "margin"), st.floats() | scalars),
    "caption_type": st.integers(0, 8),
    "image": st.sampled_from(["a.png", "../a.png", "b.png", "", "\x00", "a" * 300]),
    "images": st.lists(st.sampled_from(["a.png", None, {"path": "a.png"}, {"bytes": "x"}]), max_size=2),
}


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """What may stand in a line of JSON: known columns with nearly right values, or anything."""
    names = draw(st.lists(st.sampled_from([*sorted(KNOWN_COLUMNS - {"row_name"}), "id"]), unique=True, max_size=7))
    record = {name: draw(NEARLY_RIGHT.get(name, anything)) for name in names}
    if draw(st.integers(0, 5)) == 0 and names:
        record[names[0]] = draw(anything)
    return record


@functools.cache
def folder(tmp: str) -> Path:
    tiny_models.image().save(Path(tmp) / "a.png")
    return Path(tmp)


@pytest.mark.parametrize("stage", COMPLETIONS)
@examples(70)
@given(record=records(), kind=kinds)
def test_a_record_becomes_a_row_or_an_error_that_names_it(
    stage: str, record: dict[str, Any], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = folder(str(tmp_path_factory.getbasetemp()))
    make = RowMaker("x.json", stage, stage_features(stage), is_json=True, image_folder=place, decode=True)
    row = make.row({"index": 3, "json": json.dumps(record)}, 0)
    if row.get("_reason"):
        assert row["_problem"] and row["_fix"] and row["row_name"]
        return
    stage_features(stage).encode_example({name: row.get(name) for name in stage_features(stage)})
    collator = collators(kind, stage)[-1]
    try:
        batch = collator([row])
    except ExplainedError:
        return
    assert batch["input_ids"].shape[0] in (1, 2)


@pytest.mark.parametrize("stage", COMPLETIONS)
@examples(6)
@given(drawn=st.lists(records() | anything, min_size=1, max_size=4))
def test_a_file_becomes_rows_in_its_order_or_an_error(
    stage: str, drawn: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = folder(str(tmp_path_factory.getbasetemp()))
    good = {
        "sft": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        "preference": {"prompt": ASKED, "chosen": answer("a"), "rejected": answer("b")},
        "prompt": {"prompt": ASKED},
    }[stage]
    (place / "x.jsonl").write_text("\n".join(map(json.dumps, [good, *drawn, good])))
    rows = load_rows(place / "x.jsonl", stage, on_bad_row="skip")
    names = rows["row_name"][:]
    assert names[0] == "x.jsonl[0]" and names[-1] == f"x.jsonl[{len(drawn) + 1}]"
    assert names == sorted(names)


ASKED = [{"role": "user", "content": "Hi"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# --- reward terms ----------------------------------------------------------------------------------------------------


@examples(50)
@given(st.lists(st.tuples(texts, st.sampled_from(ANSWER_TYPES)), min_size=1, max_size=5), st.data())
def test_terms_judge_each_answer_by_itself(drawn: list[tuple[str, str]], data: st.DataObject) -> None:
    answers, types = [text for text, _ in drawn], [kind for _, kind in drawn]
    ids = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=len(drawn), max_size=len(drawn)))
    order = data.draw(st.permutations(range(len(drawn))))
    both = correctness(answers, types, yes_no="both")
    assert all(abs(value) in (0.0, 1.0, 2.0) for value in both)
    assert correctness([[{"role": "assistant", "content": text}] for text in answers], types, yes_no="both") == both
    length = length_term(ids, response_length=6)
    assert all(math.isfinite(value) and -10 <= value <= 0 for value in length)
    stops = missing_eos(ids, eos_token_id=2)
    moved_answers, moved_types, moved_ids = ([column[i] for i in order] for column in (answers, types, ids))
    assert correctness(moved_answers, moved_types, yes_no="both") == [both[i] for i in order]
    assert length_term(moved_ids, response_length=6) == [length[i] for i in order]
    assert missing_eos(moved_ids, eos_token_id=2) == [stops[i] for i in order]


@pytest.mark.slow
def test_ten_times_as_many_examples() -> None:
    environment = {**os.environ, "TRL_LLAVA_EXAMPLES": "10"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
