"""Hands a trainer's checkpoints to the Hub as they are saved, and says how those that a stop leaves are pushed."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from trl_llava.publish.push import HubPush, quiet_client
from trl_llava.publish.repository import Repository

logger = logging.getLogger(__name__)

SETTLING = 60.0
"""Seconds that a training that ends early gives the push of its last checkpoint."""


class PushAtSaves(TrainerCallback):
    """Hands each finished checkpoint to `HubPush`.

    Args:
        trainer: The trainer, whose model card goes with each checkpoint.
        push: The run's pushes.
        write_samples: Writes samples for the card of the finished run.
        end_follows: Whether `end` is called after a training that was not asked to stop.
    """

    def __init__(
        self, trainer: Any, push: HubPush, write_samples: Callable[[], None] | None, end_follows: bool
    ) -> None:
        self.trainer, self.push, self.write_samples, self.end_follows = trainer, push, write_samples, end_follows

    def end(self) -> None:
        """Pushes the finished run, with samples in its card; everything else is in `output_dir` already.

        Raises:
            PushError: If the Hub does not take it.
        """
        if self.write_samples is not None:
            self.write_samples()
        self.trainer.create_model_card()
        logger.info("Pushed to %s", self.push.end())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called behind `_save_checkpoint`, when the checkpoint has its final name.

        Args:
            args: The run's arguments.
            state: Its state.
            control: Unused.
            **kwargs: Unused.
        """
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.push.strategy is not HubStrategy.END and folder.is_dir():
            self.trainer.create_model_card()
            self.push.checkpoint(folder, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called when the training ends, also when it was asked to: the last checkpoint shall still get away.

        Args:
            args: Unused.
            state: Unused.
            control: Unused.
            **kwargs: Unused.
        """
        push, waiting = self.push, self.push.waiting
        if not waiting or (self.end_follows and not self.trainer.asked_to_stop):
            return
        name = push.repository.name
        # First the command: whoever sent the signal may not leave us the time for more.
        print(
            f"{waiting[-1]} is saved; pushing it to {name} for up to {SETTLING:.0f} seconds. If that is cut short, "
            f"push it with:\n    {push.command}",
            flush=True,
        )
        try:
            left = push.settle(SETTLING)
        except KeyboardInterrupt:  # the second Ctrl-C: no more waiting, but the run still says how it goes on
            left = push.waiting
        because = f" ({push.failure})" if push.failure else ""
        print(f"Pushed to {name}." if not left else f"Not pushed to {name}: {', '.join(left)}{because}.", flush=True)


def push_saves(
    trainer: Any,
    repository: Repository | None,
    *,
    write_samples: Callable[[], None] | None = None,
    end_follows: bool = False,
) -> PushAtSaves | None:
    """Let a trainer's checkpoints be pushed as they are made.

    Args:
        trainer: The trainer.
        repository: Where to, or None.
        write_samples: Writes samples for the card of the finished run.
        end_follows: Whether its `end` is called after a training that was not asked to stop.

    Returns:
        What pushes the finished run; None if nothing is pushed from this process.
    """
    if repository is None:
        return None
    args = trainer.args
    quiet_client()  # now, when models are loaded
    trainer.hub_model_id = repository.name
    push = HubPush(repository, Path(args.output_dir), HubStrategy(args.hub_strategy), args.hub_always_push)
    callback = PushAtSaves(trainer, push, write_samples, end_follows)
    trainer.add_callback(callback)
    return callback
