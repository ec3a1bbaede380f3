"""Ask a model about images and measure how true its answers are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from trl_llava.demo.data import IMAGES
from trl_llava.demo.metrics import Answered, Truthfulness, measure
from trl_llava.models.adapters import load_adapter
from trl_llava.models.load import load_processor


@dataclass(frozen=True)
class Evaluation:
    """What a model answered, in the rows' order, and how true that is."""

    answers: list[Answered]
    quality: Truthfulness


def evaluate(base: str | Path, adapter: str | Path | None, data: Path, rows: list[dict[str, Any]]) -> Evaluation:
    """Complete the prompts of `prompts/test.jsonl`, sampled at temperature 1 as PPO's rollouts are.

    `adapter` None asks the base itself. The same for the same model, as the sampling has a fixed seed.
    """
    model = AutoModelForImageTextToText.from_pretrained(base)
    if adapter is not None:
        model = load_adapter(model, str(adapter), is_trainable=False)
    images = [Image.open(data / IMAGES / row["images"][0]).convert("RGB") for row in rows]
    questions = [row["prompt"][-1]["content"] for row in rows]
    replies = generate_answers(model, load_processor(str(base)), images, questions)
    answers = [
        Answered(row["kind"], row["answer_type"], tuple(row["objects"]), *reply)
        for row, reply in zip(rows, replies, strict=True)
    ]
    return Evaluation(answers, measure(answers))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 32,
    batch_size: int = 150,
    seed: int = 0,
) -> list[tuple[str, int]]:
    """Complete one question per image; returns each answer, stripped, and its tokens with the end-of-turn token.

    Temperature 1 samples as PPO's rollouts do, 0 takes the likeliest token; torch's global generator stays as it was.
    """
    was_training = model.training
    model.eval()
    tokenizer = processor.tokenizer
    answers: list[tuple[str, int]] = []
    sampling: dict[str, float | bool] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}  # the whole distribution, as in rollouts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # `generate` samples from the global generator only
        for start in range(0, len(questions), batch_size):
            end = start + batch_size
            texts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                    add_generation_prompt=True,
                )
                for question in questions[start:end]
            ]
            inputs = processor(
                text=texts, images=list(images[start:end]), return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
            replies = output[:, inputs["input_ids"].shape[1] :]
            lengths = (replies != tokenizer.pad_token_id).sum(dim=1).tolist()
            texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
            answers += [(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]
    model.train(was_training)
    return answers
