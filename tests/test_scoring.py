"""The score of a completion that some reward functions have no opinion on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.health import UnhealthyRunError
from trl_llava.ppo.report import step_metrics
from trl_llava.ppo.rollout import Rollout
from trl_llava.ppo.scoring import Scorer

REWARDS = [1.0, None, 3.0, None]


def half_opinion(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    return REWARDS


def no_opinion(completion_ids: list[list[int]], **columns: Any) -> list[None]:
    return [None] * 4


def scored(folder: Path, functions: list[Any], **fields: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    args = LlavaPPOConfig(str(folder), bf16=False, **fields)
    messages = [[{"role": "assistant", "content": "red"}]] * 4
    return Scorer(args, functions)(messages, [[5]] * 4, torch.ones(4, dtype=torch.bool), {}, 1)


def test_no_opinion_is_no_reward_of_0(tmp_path: Path) -> None:
    scores, terms = scored(tmp_path, [half_opinion], reward_weights=[10.0], reward_bias=0.5)
    assert scores.tolist() == [10.5, 0.5, 30.5, 0.5]
    torch.testing.assert_close(terms["half_opinion"], torch.tensor([10.0, math.nan, 30.0, math.nan]), equal_nan=True)


def test_it_has_no_part_in_what_scores_are_normalised_with(tmp_path: Path) -> None:
    scores, _ = scored(tmp_path, [half_opinion], normalize_scores="first_batch")
    assert scores.tolist() == [-1.0, 0.0, 1.0, 0.0]  # mean 2 and spread 1 of the two rewards that there are
    with pytest.raises(UnhealthyRunError, match="no_opinion gave every completion of the first batch no reward"):
        scored(tmp_path, [no_opinion], normalize_scores="first_batch")


def test_nor_in_the_logged_mean_and_spread(tmp_path: Path) -> None:
    scores, terms = scored(tmp_path, [half_opinion, no_opinion])
    rows = torch.zeros(4, 1)
    names = ("inputs", "value_inputs", "columns", "responses", "logprobs", "ref_logprobs", "values")
    rollout = Rollout(**dict.fromkeys(names, rows), mask=rows == 0, stopped=rows[:, 0] == 0, kl=rows)
    rollout.scores, rollout.terms = scores, terms
    metrics = step_metrics(rollout, {}, 0.05, lambda values: values, lambda values: values)
    assert metrics["rewards/half_opinion/mean"] == 2.0
    assert metrics["rewards/half_opinion/std"] == 1.0
    assert metrics["objective/scores"] == 1.0
    assert "rewards/no_opinion/mean" not in metrics
