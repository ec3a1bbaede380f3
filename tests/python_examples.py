"""Examples of docstrings and documents, run at toy size: their Hub IDs stand for tiny models and rows."""

import ast
import doctest
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hub_layouts
import tiny_models
import torch
from datasets import Dataset
from transformers import AutoProcessor

from trl_llava.models.sequence_classification import LlavaForSequenceClassification
from trl_llava.prompts import JudgingPrompt
from trl_llava.rewards.factual_reward import FactualReward

BASE, ROWS, REWARD = "llava-hf/llava-1.5-7b-hf", "openbmb/RLAIF-V-Dataset", "org/llava-factual-rm"


class ToyWorld:
    """What the names in examples stand for, written into a folder.

    Args:
        folder: Where to; examples run there.
        base: A tiny LLaVA.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        record = {"ds_name": "RLAIF-V", "question": hub_layouts.QUESTION, **hub_layouts.PAIR}
        rows = [{**record, "image": tiny_models.image(color)} for color in ("red", "blue", "green", "white")]
        Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
        torch.manual_seed(0)
        model = LlavaForSequenceClassification.from_pretrained(base, num_labels=1)
        FactualReward(model, AutoProcessor.from_pretrained(base), JudgingPrompt(with_captions=False)).save_pretrained(
            folder / "rm"
        )
        self.places = {
            f'load_dataset("{ROWS}"': f'load_dataset("parquet", data_files="{folder}/rows.parquet"',
            f'"{ROWS}"': f'"{folder}/rows.parquet"',
            f'"{BASE}"': f'"{base}"',
            f'"{REWARD}"': f'"{folder}/rm"',
            "total_episodes=10_000": "total_episodes=4, per_device_train_batch_size=2",
            "response_length=256": "response_length=4",
            "max_completion_length=256": "max_completion_length=4",
            "num_generations=4": "num_generations=2",
            "num_train_epochs=1": "max_steps=2, per_device_train_batch_size=2",
        }

    def run(self, sources: Iterable[tuple[str, str]], names: dict[str, Any]) -> None:
        """Run sources in turn, each with the output that it announces, if any; `names` are there and are added to."""
        for source, want in sources:
            for name, place in self.places.items():
                source = source.replace(name, place)
            source = re.sub(r'Config\("(\w+)"', r'Config("\1", use_cpu=True, bf16=False', source)
            if want:
                (expression,) = ast.parse(source, mode="exec").body
                assert isinstance(expression, ast.Expr), source
                assert repr(eval(compile(ast.Expression(expression.value), source, "eval"), names)) == want.strip()
            else:
                exec(compile(source, "<example>", "exec"), names)


def of_docstring(text: str) -> list[tuple[str, str]]:
    """The examples of a docstring with what they print."""
    return [(example.source, example.want) for example in doctest.DocTestParser().get_examples(text)]
