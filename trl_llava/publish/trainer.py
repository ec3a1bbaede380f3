"""How a trainer pushes: each checkpoint as it is saved, and with `push_to_hub` what the commands push."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from trl_llava.errors import ExplainedError
from trl_llava.publish.model_card import write_card_of
from trl_llava.publish.push import HubPush
from trl_llava.publish.repository import Repository

logger = logging.getLogger(__name__)

SETTLING = 60.0
"""Seconds that a training that ends early gives the push of its last checkpoint."""


class PushAtSaves(TrainerCallback):
    """Hands each finished checkpoint of a trainer to `HubPush`; `end` pushes the finished run.

    `end_follows` says that `end` is called after a training that no signal has ended, so that nothing waits before.
    """

    def __init__(
        self,
        trainer: Any,
        repository: Repository,
        write_samples: Callable[[], None] | None = None,
        end_follows: bool = False,
    ) -> None:
        args = trainer.args
        self.trainer, self.write_samples, self.end_follows = trainer, write_samples, end_follows
        self.push = HubPush(repository, Path(args.output_dir), HubStrategy(args.hub_strategy), args.hub_always_push)
        trainer.hub_model_id = repository.name
        disable_progress_bars()  # they would run into the training's

    def end(self) -> None:
        """Push the finished run, with samples in its card; everything else is in `output_dir` already."""
        if self.write_samples is not None:
            self.write_samples()
        self.trainer.create_model_card()
        logger.info("Pushed to %s", self.push.end())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pushes the checkpoint, which has its final name by now."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.push.strategy is not HubStrategy.END and folder.is_dir():
            self.trainer.create_model_card()
            try:
                self.push.checkpoint(folder, state.global_step)
            except (ExplainedError, OSError) as error:  # a token in a file, a full disk: the training is worth more
                logger.warning("%s is not pushed: %s. Training goes on.", folder.name, error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the last checkpoint some time, also if a signal has ended the training."""
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
            left = push.settle(attempts=2, seconds=SETTLING)
        except KeyboardInterrupt:  # the second Ctrl-C: no more waiting, but the run still says how it goes on
            left = push.waiting
        because = f" ({push.failure})" if push.failure else ""
        print(f"Pushed to {name}." if not left else f"Not pushed to {name}: {', '.join(left)}{because}.", flush=True)


class PushesSafely(Trainer):
    """Mixed into a trainer, before TRL's: nothing it pushes is a pickle, holds a token, or names paths of the machine.

    transformers pushes `training_args.bin`, a pickle, with everything else that lies in `output_dir`, and forgets what
    fails. Here a failed push is tried again, each checkpoint has its tag, and the card is that of the commands, but
    for the samples.
    """

    stage = ""
    """The name of the stage, for the card."""

    hub_model_id: str | None
    _pushes: PushAtSaves | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make sure that we may write to the repository, as upstream whatever it holds: `HubError` if not."""
        if not self.is_world_process_zero() or self._pushes is not None:
            return
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        private = args.hub_private_repo if private is None else private
        token = args.hub_token if token is None else token
        repository = Repository(name, args.hub_revision, private, recipe=None, onto_existing=True, token=token)
        repository.verify()
        self._pushes = PushAtSaves(self, repository)
        self.add_callback(self._pushes)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model as it is now, and push it with its card; waits until it is there.

        Args:
            commit_message: title of the commit.
            blocking: must be true: what fails would not be known.
            token: what to log in with; by default `args.hub_token`, or what the machine is logged in with.
            revision: branch; `args.hub_revision` by default.
            private: whether a new repository is private; `args.hub_private_repo` by default.
            **kwargs: for `create_model_card`.

        Returns:
            The address of the commit, `None` on other processes than the first.

        Raises:
            ValueError: if `blocking` is false.
            HubError: if there is no token, or it is refused or too weak.
            PushError: if the Hub does not take it, which is then in `output_dir`.
        """
        if not blocking:
            raise ValueError("push_to_hub(blocking=False) is not there: the process could end with nothing pushed")
        self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if self._pushes is None:
            return None
        push = self._pushes.push
        if revision is not None and revision != push.repository.revision:
            push.repository.revision, push.repository.verified = revision, False
        self.create_model_card(**kwargs)
        return push.end(commit_message or "End of training")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into `args.output_dir`.

        Args:
            model_name: name in the title.
            dataset_name: Hub ID of the data.
            tags: further tags.
        """
        model = self.accelerator.unwrap_model(self.model)
        base = str(getattr(model, "policy", model).config._name_or_path)
        write_card_of(self, self.stage, base, self.args.to_dict(), model_name, dataset_name, tags)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Upstream's way; ours is the callback's.
        pass
