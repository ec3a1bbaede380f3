"""GRPO's and RLOO's place in their answers, saved: several steps learn from one generation.

TRL generates once for `steps_per_generation` x `num_iterations` passes, and at a restart forgets both the answers and
how far it got: a run resumed in between would answer again, and from then on answer other prompts. Its sampler draws
the order of an epoch after those of the epochs before, which a resumed run has not drawn.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from trl_llava.run.safe_checkpoints import SafeCheckpoints

logger = logging.getLogger(__name__)
_LOGS = ("prompt", "completion", "advantages")


class ResumableGenerations(SafeCheckpoints):
    """Mixed into `GRPOTrainer` or `RLOOTrainer`, before it: resumed between two generations, it keeps its answers."""

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        self._prompt_order = super()._get_train_sampler(dataset)
        return self._prompt_order

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._step % (self.args.steps_per_generation * self.num_iterations):  # else the next pass generates anyway
            torch.save({"answers": self._buffered_inputs, "logs": _texts(self._logs)}, self._file(Path(output_dir)))

    def _restore_loop(self, checkpoint: Path) -> None:
        super()._restore_loop(checkpoint)
        self._draw_earlier_epochs()
        if self._file(checkpoint).is_file():
            saved = torch.load(self._file(checkpoint), map_location=self.accelerator.device, weights_only=True)
            self._buffered_inputs = saved["answers"]
            _put_back(self._logs, saved["logs"])
        elif any(checkpoint.glob("generation_*.pt")):
            logger.warning(
                "%s was saved between two generations by another number of processes: its prompts are answered again.",
                checkpoint,
            )

    def _draw_earlier_epochs(self) -> None:
        loader, order = self.callback_handler.train_dataloader, self._prompt_order
        steps_per_epoch = max(-(-len(loader) // self.args.gradient_accumulation_steps), 1)
        if self.shuffle_dataset:
            for _ in range(self.state.global_step // steps_per_epoch):
                torch.randperm(order.num_samples, generator=order.generator)

    def _file(self, checkpoint: Path) -> Path:
        return checkpoint / f"generation_{self.args.process_index}_of_{self.args.world_size}.pt"


def _texts(logs: dict[str, Any]) -> dict[str, Any]:
    """What the next table of completions shows of this generation; without its pictures, which only W&B gets."""
    named = {name: {key: list(values) for key, values in logs[name].items()} for name in ("rewards", "extra")}
    return named | {name: list(logs[name]) for name in _LOGS}


def _put_back(logs: dict[str, Any], texts: dict[str, Any]) -> None:
    for name in _LOGS:
        logs[name].extend(texts[name])
    for name in ("rewards", "extra"):
        for key, values in texts[name].items():
            logs[name][key].extend(values)
