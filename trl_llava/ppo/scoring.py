"""The score of a response: reward functions, weighted and normalised, and the symbolic terms of the config."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.errors import InputError
from trl_llava.health import UnhealthyRunError, check_finite
from trl_llava.ppo.ppo_math import Reduce, one_process
from trl_llava.rewards.functions import RewardFunction, function_name
from trl_llava.rewards.reward_terms import correctness, length_term


class Scorer:
    """Scores responses as a config says, and remembers what it normalises with.

    The score of a response is `sum_i weight_i * normalise(function_i)`, plus the correctness and length terms, minus
    the penalty for a missing stop token (which may also replace what the functions say), plus the bias; the formulae
    are the paper's.
    """

    def __init__(self, args: LlavaPPOConfig, reward_funcs: Sequence[RewardFunction]) -> None:
        """Check that functions and weights fit: one weight for each, names that differ, none asynchronous."""
        self.args = args
        self.reward_funcs = list(reward_funcs)
        self.names = [function_name(function) for function in self.reward_funcs]
        self.weights = args.reward_weights or [1.0] * len(self.reward_funcs)
        self.normalisers: dict[str, tuple[float, float]] = {}
        if len(self.weights) != len(self.reward_funcs):
            raise InputError(
                f"`reward_weights` has {len(self.weights)} entries for {len(self.reward_funcs)} reward functions "
                f"({', '.join(self.names)}): give one weight for each"
            )
        if len(set(self.names)) != len(self.names):
            raise InputError(f"two reward functions share a name: {self.names}. Give each its own `__name__`")
        for name, function in zip(self.names, self.reward_funcs, strict=True):
            if inspect.iscoroutinefunction(function):
                raise InputError(f"reward function {name} is asynchronous, which PPO does not support: make it a def")

    def __call__(
        self,
        completions: list[list[dict[str, Any]]],
        completion_ids: list[list[int]],
        stopped: torch.Tensor,
        columns: dict[str, list],
        step: int,
        reduce: Reduce = one_process,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Score B completions.

        Args:
            completions: B conversations of one assistant message each.
            completion_ids: B lists of token ids, stop token included.
            stopped: (B,) bool, `True` if the completion holds its stop token.
            columns: the rows' columns, `prompts` among them, each a list of B.
            step: the PPO step, counted from 1, for error messages.
            reduce: sums a tensor over all processes.

        Returns:
            scores: (B,) float32.
            terms: (B,) of each term by name, as it enters the sum; nan where its function has no opinion.

        Raises:
            UnhealthyRunError: if a reward is not finite.
            ValueError: if a function returns another number of rewards than B.
        """
        call = {**columns, "completions": completions, "completion_ids": completion_ids}
        terms = {}
        for name, weight, function in zip(self.names, self.weights, self.reward_funcs, strict=True):
            rewards, given = self._rewards(name, function, call, stopped.device)
            check_finite(f"the reward of {name}", rewards, step)
            normalised = weight * self._normalise(name, rewards, given, reduce)
            terms[name] = normalised.masked_fill(~given, torch.nan)
        nothing = torch.zeros(len(stopped), device=stopped.device)
        functions = sum((term.nan_to_num() for term in terms.values()), start=nothing)
        for name, values in self._symbolic(call, stopped, functions).items():
            check_finite(f"the reward term {name}", values, step)
            terms[name] = values
        scores = torch.stack(list(terms.values())).nansum(0) if terms else nothing
        return scores + self.args.reward_bias, terms

    def _rewards(
        self, name: str, function: RewardFunction, call: dict[str, Any], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards (B,), and `True` for those the function has given: as in TRL, None is no opinion, and no 0."""
        rewards = function(**call)
        if len(rewards) != len(call["completions"]):
            raise InputError(
                f"reward function {name} returned {len(rewards)} rewards for {len(call['completions'])} responses"
            )
        given = torch.tensor([reward is not None for reward in rewards], device=device)
        values = [0.0 if reward is None else float(reward) for reward in rewards]
        return torch.tensor(values, dtype=torch.float32, device=device), given

    def _normalise(self, name: str, rewards: torch.Tensor, given: torch.Tensor, reduce: Reduce) -> torch.Tensor:
        if self.args.normalize_scores is None:
            return rewards
        if name not in self.normalisers:
            count = reduce(given.float().sum())
            centre = reduce(rewards[given].sum()) / count
            spread = (reduce(((rewards[given] - centre) ** 2).sum()) / count).sqrt()
            if not spread > 1e-6 * (1 + centre.abs()):
                found = f"{centre.item():.6g}" if count > 0 else "no reward"
                raise UnhealthyRunError(
                    f"reward function {name} gave every completion of the first batch {found}, so there "
                    "is no spread for `normalize_scores: first_batch` to scale by. Use a larger batch, or leave "
                    "`normalize_scores` out"
                )
            self.normalisers[name] = (centre.item(), spread.item())
        mean, std = self.normalisers[name]
        return (rewards - mean) / std

    def _symbolic(
        self, call: dict[str, Any], stopped: torch.Tensor, functions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms of the config; `functions` (B,) is the sum of the reward functions."""
        args, terms = self.args, {}
        if args.correctness_coef is not None:
            values = correctness(**call, coef=args.correctness_coef, yes_no=args.yes_no)
            terms["correctness"] = torch.tensor(values, device=stopped.device)
        if args.length_coef is not None:
            values = length_term(**call, coef=args.length_coef, response_length=args.response_length)
            terms["length"] = torch.tensor(values, device=stopped.device)
        if args.missing_eos_penalty is not None:
            replaced = functions if args.missing_eos_replaces else torch.zeros_like(functions)
            terms["missing_eos"] = (~stopped).float() * (-args.missing_eos_penalty - replaced)
        return terms
