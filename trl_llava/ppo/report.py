"""What a PPO step logs: metrics under TRL's names, and where its time went."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import ProgressCallback
from transformers.trainer_callback import CallbackHandler

from trl_llava.ppo.ppo_math import Reduce
from trl_llava.ppo.rollout import Rollout


class PhaseClock:
    """Measures the phases of a step, and shows the running one beside the progress bar."""

    def __init__(self, callback_handler: CallbackHandler, device: torch.device) -> None:
        self.callback_handler = callback_handler
        self.device = device
        self.start()

    def _now(self) -> float:
        if self.device.type == "cuda":  # else a phase would be charged with what the one before has only queued
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        """Begin a step."""
        self.step_start = self._now()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(name)
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` and `time/step` in seconds, since `start`."""
        phases = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        return {**phases, "time/step": self._now() - self.step_start}


def step_metrics(
    rollout: Rollout,
    update_metrics: dict[str, float],
    kl_coef: float,
    gather: Callable[[torch.Tensor], torch.Tensor],
    reduce: Reduce,
) -> dict[str, float]:
    """The metrics of one step over all processes, under TRL's names.

    Also `rewards/<term>/mean` and `/std` for each reward term, over the completions that its function has an opinion
    on; `completions/mean_length` in tokens (stop token included); and of the completions the share without a stop
    token (`completions/clipped_ratio`) or without any text (`completions/empty_ratio`). `gather` concatenates a tensor
    over all processes, `reduce` sums it.
    """
    kl = gather(rollout.kl.sum(1))
    scores = gather(rollout.scores)
    lengths = gather(rollout.mask.sum(1)).float()
    non_score_reward = -kl_coef * kl.mean()
    metrics = {
        "objective/kl": kl.mean(),
        "objective/entropy": gather(-rollout.logprobs.sum(1)).mean(),
        "objective/non_score_reward": non_score_reward,
        "objective/rlhf_reward": non_score_reward + scores.mean(),
        "objective/scores": scores.mean(),
        "completions/mean_length": lengths.mean(),
        "completions/clipped_ratio": 1.0 - gather(rollout.stopped).float().mean(),
        "completions/empty_ratio": gather(rollout.empty).float().mean(),
        "val/num_eos_tokens": reduce(rollout.stopped.sum()),
    }
    for name, values in rollout.terms.items():
        everywhere = gather(values)
        everywhere = everywhere[~everywhere.isnan()]
        if len(everywhere):
            metrics[f"rewards/{name}/mean"] = everywhere.mean()
            metrics[f"rewards/{name}/std"] = everywhere.std(unbiased=False)
    return {name: float(value) for name, value in metrics.items()} | update_metrics
