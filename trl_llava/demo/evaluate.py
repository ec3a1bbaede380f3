"""Ask a model about unseen pictures and measure how true its answers are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_llava.demo.answering import generate_answers
from trl_llava.demo.data import PICTURES
from trl_llava.demo.metrics import Answered, Truthfulness, measure
from trl_llava.models.adapters import load_adapter


@dataclass(frozen=True)
class Evaluation:
    """What a model answered and how true that is.

    Attributes:
        answers: One per row, in the rows' order.
        quality: Means over them.
    """

    answers: list[Answered]
    quality: Truthfulness


def evaluate(base: str | Path, adapter: str | Path | None, data: Path, rows: list[dict[str, Any]]) -> Evaluation:
    """Answer the questions of prompt rows, sampled at temperature 1 as PPO's rollouts are.

    Args:
        base: Hub ID or folder of the base model.
        adapter: A stage's result on it; None asks the base itself.
        data: The folder that `write_data` has filled.
        rows: Rows of `prompts/test.jsonl`.

    Returns:
        Answers and means; the same for the same model, as the sampling has a fixed seed.
    """
    model = AutoModelForImageTextToText.from_pretrained(base)
    if adapter is not None:
        model = load_adapter(model, str(adapter), is_trainable=False)
    pictures = [Image.open(data / PICTURES / row["images"][0]).convert("RGB") for row in rows]
    questions = [row["prompt"][-1]["content"] for row in rows]
    replies = generate_answers(model, AutoProcessor.from_pretrained(base), pictures, questions)
    answers = [
        Answered(row["kind"], row["answer_type"], tuple(row["objects"]), *reply)
        for row, reply in zip(rows, replies, strict=True)
    ]
    return Evaluation(answers, measure(answers))
