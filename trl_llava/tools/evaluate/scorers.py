"""Reward models as they score rows: with captions, without them, and foreign ones that know of no judging prompt."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoTokenizer

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError
from trl_llava.hub.lookup import check_there, find_file
from trl_llava.hub.names import split_revision
from trl_llava.models.load import load_processor, load_sequence_classifier
from trl_llava.prompts import Message
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.rewards.reward_settings import SETTINGS_FILE
from trl_llava.tools.evaluate.model import Row, check_has_model, model_config

AT_ONCE = 64
"""How many rows are scored between two steps of the bar."""


class Scorer(NamedTuple):
    """A reward model, and whether it is shown the images: a text model is not."""

    name: str
    reward: FactualReward
    sees: bool = True

    def scores(self, rows: Sequence[Row], column: str, captions: bool = True) -> list[float]:
        """One score for each row's completion in a column; `captions` False leaves them out of the prompt."""
        return self.scores_of(rows, lambda place, row: row[column], column, captions)

    def scores_of(
        self, rows: Sequence[Row], completion: Callable[[int, Row], Any], what: str, captions: bool = True
    ) -> list[float]:
        """One score for each row's completion, by its place and the row; a few rows are in memory at a time."""
        reward, judging_prompt = self.reward, self.reward.judging_prompt
        if judging_prompt is not None and not captions:
            reward.judging_prompt = dataclasses.replace(judging_prompt, with_captions=False)
        try:
            found: list[float] = []
            starts = range(0, len(rows), AT_ONCE)
            for start in tqdm(starts, desc=f"{self.name}: {what}", disable=None):
                places = range(start, min(start + AT_ONCE, len(rows)))
                part = [rows[place] for place in places]
                found += reward(
                    [row["prompt"] if self.sees else _words(row["prompt"]) for row in part],
                    [completion(place, row) for place, row in zip(places, part, strict=True)],
                    images=[row["images"] if self.sees else [] for row in part],
                    captions=[row.get("captions") for row in part],
                    row_name=[row["row_name"] for row in part],
                )
            return found
        finally:
            reward.judging_prompt = judging_prompt


def load_scorer(name: str, model_args: LlavaModelConfig, batch_size: int, base: str | None = None) -> Scorer:
    """A reward model of ours, or any other with a score head: that one reads the conversation as it is."""
    path, revision = split_revision("--reward_model", name)
    check_has_model(path, "--reward_model")
    check_there("--reward_model", path, revision)
    if find_file(path, SETTINGS_FILE, revision) is not None or find_file(path, "adapter_config.json", revision):
        reward = FactualReward.from_pretrained(
            path, revision=revision, model_args=model_args, base_model=base, batch_size=batch_size
        )
        return Scorer(name, reward)
    model = load_sequence_classifier(path, model_args, revision=revision, new_head=False).requires_grad_(False)
    sees = hasattr(model.config, "vision_config")
    reads: Any = (
        load_processor(path, revision=revision, field="--reward_model")
        if sees
        else AutoTokenizer.from_pretrained(path, revision=revision)
    )
    reward = FactualReward(model, reads, None, batch_size=batch_size, device=PartialState().device)
    return Scorer(name, reward, sees)


def _words(prompt: list[Message]) -> list[Message]:
    return [
        {**message, "content": [part for part in message["content"] if part["type"] == "text"]} for message in prompt
    ]


def loading_config(args: Any) -> LlavaModelConfig:
    """How the options of `add_loading` load a reward model."""
    if args.chat_template_path:
        raise InputError("--chat_template_path: a reward model reads with the template that it was trained with")
    return model_config(
        args.dtype,
        load_in_4bit=args.load_in_4bit,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
