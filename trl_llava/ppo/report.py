"""What a PPO step logs: metrics under TRL's names, and a table of sample completions with their rewards."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase, ProgressCallback
from transformers.trainer_callback import CallbackHandler

from trl_llava.configs.ppo import LlavaPPOConfig
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
    on, `completions/mean_length` in tokens (stop token included) and `completions/clipped_ratio`, the share of
    completions without a stop token. `gather` concatenates a tensor over all processes, `reduce` sums it.
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
        "val/num_eos_tokens": reduce(rollout.stopped.sum()),
    }
    for name, values in rollout.terms.items():
        everywhere = gather(values)
        everywhere = everywhere[~everywhere.isnan()]
        if len(everywhere):
            metrics[f"rewards/{name}/mean"] = everywhere.mean()
            metrics[f"rewards/{name}/std"] = everywhere.std(unbiased=False)
    return {name: float(value) for name, value in metrics.items()} | update_metrics


def last_question(messages: list[dict[str, Any]]) -> str:
    """The text of the last user turn."""
    content = [message["content"] for message in messages if message["role"] == "user"][-1]
    return (
        content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")
    )


def sample_table(rollout: Rollout, texts: list[str]) -> pd.DataFrame:
    """One row per completion: `query`, `model response`, `score`, and each reward term."""
    table: dict[str, list] = {
        "query": [last_question(prompt) for prompt in rollout.columns["prompts"]],
        "model response": texts,
        "score": rollout.scores.tolist(),
    }
    return pd.DataFrame({**table, **{name: values.tolist() for name, values in rollout.terms.items()}})


def completions_table(
    batches: Iterable[dict[str, Any]],
    complete: Callable[[dict[str, Any]], Rollout],
    tokenizer: PreTrainedTokenizerBase,
    *,
    first_only: bool,
) -> pd.DataFrame | None:
    """Generate for batches of prompts, and put the completions of all processes into one `sample_table`.

    `None` if there is no batch; `first_only` stops after one.
    """
    tables = []
    for batch in batches:
        rollout = complete(batch)
        texts = tokenizer.batch_decode([row[mask] for row, mask in zip(rollout.responses, rollout.mask, strict=True)])
        tables += gather_object([sample_table(rollout, texts)])
        if first_only:
            break
    return pd.concat(tables, ignore_index=True) if tables else None


def report_samples(table: pd.DataFrame, args: LlavaPPOConfig, step: int) -> None:
    """Print some sample completions, and save all to `output_dir/completions/`, as TRL's `GRPOTrainer` does."""
    shown = Table(*table.columns, title=f"Sample completions after step {step}", show_lines=True)
    for row in table.head(5).round(3).astype(str).itertuples(index=False):
        shown.add_row(*map(escape, row))
    Console().print(shown)
    folder = Path(args.output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"completions_{step:05d}.parquet")
    if "wandb" in args.report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({"completions": wandb.Table(dataframe=table)})
