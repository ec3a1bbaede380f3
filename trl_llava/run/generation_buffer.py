"""GRPO's and RLOO's place in their completions, saved: several steps learn from one generation.

TRL generates once for `steps_per_generation` x `num_iterations` passes, and at a restart forgets both the completions
and how far it got: a run resumed in between would generate again, and from then on for other prompts. Its sampler
draws the order of an epoch after those of the epochs before, which a resumed run has not drawn.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from trl_llava.run.safe_checkpoints import SafeCheckpoints

logger = logging.getLogger(__name__)
_COLUMNS = ("prompt", "completion", "advantages")
_TABLES = ("rewards", "extra")


class ResumableGenerations(SafeCheckpoints):
    """Mixed into `GRPOTrainer` or `RLOOTrainer`, before it: resumed between two generations, it keeps completions."""

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        self._prompt_order = super()._get_train_sampler(dataset)
        return self._prompt_order

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._step % (self.args.steps_per_generation * self.num_iterations):  # else the next pass generates anyway
            logs: dict[str, Any] = {name: [_without_images(value) for value in self._logs[name]] for name in _COLUMNS}
            logs |= {name: {key: list(values) for key, values in self._logs[name].items()} for name in _TABLES}
            torch.save({"completions": self._buffered_inputs, "logs": logs}, self._file(Path(output_dir)))

    def _restore_loop(self, checkpoint: Path) -> None:
        super()._restore_loop(checkpoint)
        self._draw_earlier_epochs()
        if self._file(checkpoint).is_file():
            saved = torch.load(self._file(checkpoint), map_location=self.accelerator.device, weights_only=True)
            self._buffered_inputs = saved["completions" if "completions" in saved else "answers"]  # the old name
            for name in _COLUMNS:
                self._logs[name].extend(saved["logs"][name])
            for name in _TABLES:
                for key, values in saved["logs"][name].items():
                    self._logs[name][key].extend(values)
        elif any(checkpoint.glob("generation_*.pt")):
            logger.warning(
                "%s was saved between two generations by another number of processes: completions are generated anew.",
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


def _without_images(logged: Any) -> Any:
    """A prompt or completion as TRL logs it: since 1.16 it is messages with their images, which only W&B gets."""
    if not isinstance(logged, list):
        return logged
    return [
        {**message, "content": [{key: part[key] for key in part if key != "image"} for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in logged
    ]
