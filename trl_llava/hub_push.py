"""Pushes a run to the Hub while it trains: from a thread, tried again until they succeed, told once when they fail."""

import logging
import shutil
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from trl_llava.card_samples import write_samples
from trl_llava.errors import ExplainedError
from trl_llava.hub_repository import Repository, cause
from trl_llava.output_dir import RECIPE_FILE, VERSIONS_FILE
from trl_llava.shareable import stage_run, stage_whole

logger = logging.getLogger(__name__)

STAGING = ".hub"
"""Folder in `output_dir` with what waits to be pushed: a checkpoint may be deleted before it is."""

FIRST_WAIT, LONGEST_WAIT = 30.0, 600.0
"""Seconds between two attempts while training goes on; each attempt has huggingface_hub's own retries inside."""

SETTLING = 60.0
"""Seconds that a training that was asked to stop gives the push of its last checkpoint."""

WAITS_AT_THE_END = (5.0, 15.0, 45.0)


class PushError(ExplainedError, RuntimeError):
    """A finished run that could not be pushed; it is whole in its folder."""


@dataclass
class Job:
    """One commit.

    Attributes:
        folder: What the commit holds, laid out.
        message: Its title.
        tag: The tag it gets, if any.
        replaces: Folder in the repository whose old files go.
    """

    folder: Path
    message: str
    tag: str | None = None
    replaces: str | None = None


class HubPush:
    """The pushes of one run.

    Args:
        repository: Where to.
        output_dir: The run's folder.
        strategy: transformers' `hub_strategy`.
        keep_all: transformers' `hub_always_push`: a push that waits is not given up for a newer one.
    """

    def __init__(self, repository: Repository, output_dir: Path, strategy: HubStrategy, keep_all: bool) -> None:
        self.repository, self.output_dir, self.strategy, self.keep_all = repository, output_dir, strategy, keep_all
        self.failure: str | None = None
        self.url: str | None = None
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._thread: threading.Thread | None = None
        shutil.rmtree(output_dir / STAGING, ignore_errors=True)  # of a run that was killed

    def checkpoint(self, folder: Path, step: int) -> None:
        """Take a finished checkpoint, to be pushed from the thread; nothing here waits for the Hub.

        Args:
            folder: The checkpoint.
            step: Its step.
        """
        if self.strategy is HubStrategy.END:
            return
        try:
            job = self._checkpoint_job(folder, step)
        except (ExplainedError, OSError) as error:  # a token in a file, a full disk: the training is worth more
            self._failed(error)
            return
        self._submit(job)

    def _checkpoint_job(self, folder: Path, step: int) -> Job:
        staged = self._stage(folder, folder.name)
        for name in ("README.md", "curves.png", RECIPE_FILE, VERSIONS_FILE):
            if (self.output_dir / name).is_file():
                shutil.copyfile(self.output_dir / name, staged / name)
        whole = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}.get(
            self.strategy
        )
        if whole is not None:
            stage_whole(folder, staged / whole)
        self._write_recipe(staged)
        return Job(staged, f"Training in progress, step {step}", folder.name, whole)

    def end(self) -> str:
        """Push the finished run, and wait for all that is still under way.

        Returns:
            Where it is now.

        Raises:
            PushError: If the Hub does not take it.
        """
        staged = self._stage(self.output_dir, "end")
        self._write_recipe(staged)
        with self._changed:
            self._ending = True
        self._submit(Job(staged, "End of training"))
        if self._thread is not None:
            self._thread.join()
        if self.failure is not None:
            raise PushError(
                f"the run is finished and whole in {self.output_dir}, but {self.repository.name} did not take it: "
                f"{self.failure}. Push it with `hf upload {self.repository.name} {staged} .`"
            )
        shutil.rmtree(self.output_dir / STAGING, ignore_errors=True)
        return str(self.url)

    def settle(self, seconds: float) -> None:
        """Give what is under way some time, where the process may end before the run does.

        Args:
            seconds: The longest to wait.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self.failure is not None, timeout=seconds)

    def _stage(self, source: Path, name: str) -> Path:
        staged = self.output_dir / STAGING / name
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        stage_run(source, staged)
        return staged

    def _write_recipe(self, staged: Path) -> None:
        (staged / RECIPE_FILE).write_text(self.repository.recipe.to_yaml(), encoding="utf-8")

    def _submit(self, job: Job) -> None:
        with self._changed:
            # The first one may be under way; of those behind it only the newest matters, unless all shall be kept.
            while len(self._waiting) > 1 and not self.keep_all:
                dropped = self._waiting.pop()
                logger.info("%s is not pushed: a newer one came first.", dropped.tag)
                shutil.rmtree(dropped.folder, ignore_errors=True)
            self._waiting.append(job)
            self._changed.notify()
        if self._thread is None or not self._thread.is_alive():
            # A daemon: a Hub that hangs must not keep a run that has failed from ending.
            self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        failures, last_waits = 0, iter(WAITS_AT_THE_END)
        while True:
            with self._changed:
                while not self._waiting and not self._ending:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._waiting[0]
            done = self._push(job)
            failures = 0 if done else failures + 1
            with self._changed:
                wait = next(last_waits, None) if self._ending and not done else None
                if done or (self._ending and wait is None and len(self._waiting) > 1):  # the last one gets its try too
                    self._waiting.popleft()
                    self._changed.notify_all()
                    shutil.rmtree(job.folder, ignore_errors=True)
                elif self._ending:
                    if wait is None:
                        return
                    self._changed.wait(wait)
                else:  # a newer checkpoint, or the end of the run, is a reason to try at once
                    self._changed.wait(min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT))

    def _push(self, job: Job) -> bool:
        try:
            self._upload(job)
        except Exception as error:  # whatever it is, it must not end the training; at the end it is raised
            self._failed(error)
            return False
        if self.failure is not None:
            logger.warning("Pushing to %s works again.", self.repository.name)
        self.failure = None
        return True

    def _failed(self, error: Exception) -> None:
        with self._changed:
            told, self.failure = self.failure, cause(error.__cause__ or error)
            self._changed.notify_all()
        if told is None:
            logger.warning(
                "Pushing to %s failed (%s). Training goes on; the push is tried again until it succeeds.",
                self.repository.name,
                self.failure,
            )

    def _upload(self, job: Job) -> None:
        repository, api = self.repository, HfApi()
        if not repository.verified:
            repository.verify()
        commit = api.upload_folder(
            repo_id=repository.name,
            folder_path=job.folder,
            commit_message=job.message,
            revision=repository.revision,
            delete_patterns=None if job.replaces is None else f"{job.replaces}/*",
        )
        if job.tag is not None:
            _tag(api, repository.name, job.tag, commit.oid)
        self.url = commit.commit_url


class PushAtSaves(TrainerCallback):
    """Hands each finished checkpoint to `HubPush`.

    Args:
        trainer: The trainer, whose model card goes with each checkpoint.
        push: The run's pushes.
        samples: How many rows of the data the card of the finished run shows.
    """

    def __init__(self, trainer: Any, push: HubPush, samples: int) -> None:
        self.trainer, self.push, self.samples = trainer, push, samples

    def end(self) -> None:
        """Pushes the finished run, with samples in its card; everything else is in `output_dir` already.

        Raises:
            PushError: If the Hub does not take it.
        """
        write_samples(self.trainer, self.samples)
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
        self.push.settle(SETTLING)


def push_saves(trainer: Any, repository: Repository | None, samples: int) -> PushAtSaves | None:
    """Let a trainer's checkpoints be pushed as they are made.

    Args:
        trainer: The trainer.
        repository: Where to, or None.
        samples: How many rows of the data the card of the finished run shows.

    Returns:
        What pushes the finished run; None if nothing is pushed from this process.
    """
    if repository is None:
        return None
    args = trainer.args
    # Models are loaded by now. The client's bars would be drawn through the training's, and each of its own retries
    # told; a push that fails is told once, here.
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    trainer.hub_model_id = repository.name
    push = HubPush(repository, Path(args.output_dir), HubStrategy(args.hub_strategy), args.hub_always_push)
    callback = PushAtSaves(trainer, push, samples)
    trainer.add_callback(callback)
    return callback


def _tag(api: HfApi, name: str, tag: str, commit: str) -> None:
    """Names a commit; a tag of an earlier attempt, or of a run that was taken up again before it, moves."""
    try:
        api.create_tag(name, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        api.delete_tag(name, tag=tag)
        api.create_tag(name, tag=tag, revision=commit)
