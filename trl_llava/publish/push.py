"""Pushes a run to the Hub while it trains: from a thread, tried again until they succeed, told once when they fail."""

import logging
import shlex
import shutil
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars
from transformers.trainer_utils import HubStrategy

from trl_llava.errors import ExplainedError
from trl_llava.publish.repository import Repository, cause
from trl_llava.publish.shareable import stage_run, stage_whole
from trl_llava.run.output_dir import RECIPE_FILE, VERSIONS_FILE

logger = logging.getLogger(__name__)

STAGING = ".hub"
"""Folder in `output_dir` with what waits to be pushed: a checkpoint may be deleted before it is."""

FIRST_WAIT, LONGEST_WAIT = 30.0, 600.0
"""Seconds between two attempts while training goes on; each attempt has huggingface_hub's own retries inside."""

WAITS_AT_THE_END = (5.0, 15.0, 45.0)


class PushError(ExplainedError, RuntimeError):
    """A run that could not be pushed; it is whole in its folder."""


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
        self._ending = self._at_once = False
        self._begun = self._last_failed = 0  # attempts, counted from 1
        self._thread: threading.Thread | None = None
        shutil.rmtree(output_dir / STAGING, ignore_errors=True)  # of a run that was killed

    @property
    def command(self) -> str:
        """How the user pushes this run once the process is gone.

        Returns:
            A command line.
        """
        return shlex.join(["trl-llava", "push", str(self.output_dir), "--hub_model_id", self.repository.name])

    def checkpoint(self, folder: Path, step: int) -> None:
        """Take a finished checkpoint, to be pushed from the thread; nothing here waits for the Hub.

        Args:
            folder: The checkpoint.
            step: Its step.
        """
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

    def end(self, message: str = "End of training") -> str:
        """Push the finished run, and wait for all that is still under way.

        Args:
            message: Title of the commit.

        Returns:
            Where it is now.

        Raises:
            PushError: If the Hub does not take it.
        """
        staged = self._stage(self.output_dir, "end")
        self._write_recipe(staged)
        with self._changed:
            self._ending = True
        self._submit(Job(staged, message))
        return self.finish()

    def finish(self) -> str:
        """Wait for all that is still under way; what the Hub does not take after some more attempts is given up.

        Returns:
            Where it is now.

        Raises:
            PushError: If the Hub does not take it.
        """
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        shutil.rmtree(self.output_dir / STAGING, ignore_errors=True)
        if self.failure is not None:
            raise PushError(
                f"the run is whole in {self.output_dir}, but {self.repository.name} did not take it: {self.failure}. "
                f"Push it with:\n    {self.command}"
            )
        return str(self.url)

    def settle(self, seconds: float) -> list[str]:
        """Give what is under way some time, where the process may end before the run does.

        Args:
            seconds: The longest to wait. A Hub that fails one more attempt, begun from now on, is not waited for.

        Returns:
            Checkpoints that are still not there.
        """
        with self._changed:
            before, self._at_once = self._begun, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting or self._last_failed > before, timeout=seconds)
            return self.waiting

    @property
    def waiting(self) -> list[str]:
        """What has not been pushed yet.

        Returns:
            Names of checkpoints.
        """
        return [job.folder.name for job in self._waiting]

    def _stage(self, source: Path, name: str) -> Path:
        staged = self.output_dir / STAGING / name
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        stage_run(source, staged)
        return staged

    def _write_recipe(self, staged: Path) -> None:
        if self.repository.recipe is not None:
            (staged / RECIPE_FILE).write_text(self.repository.recipe.to_yaml(), encoding="utf-8")

    def _submit(self, job: Job) -> None:
        with self._changed:
            # The first one may be under way; of those behind it only the newest matters, unless all shall be kept.
            while len(self._waiting) > 1 and not self.keep_all:
                dropped = self._waiting.pop()
                logger.info("%s is not pushed: a newer one came first.", dropped.tag)
                shutil.rmtree(dropped.folder, ignore_errors=True)
            self._waiting.append(job)
            self._changed.notify_all()
            if self._thread is None:
                # A daemon: a Hub that hangs must not keep a run that has failed from ending.
                self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        failures, last_waits = 0, iter(WAITS_AT_THE_END)
        while (job := self._next()) is not None:
            done = self._push(job)
            failures = 0 if done else failures + 1
            with self._changed:
                wait = next(last_waits, None) if self._ending and not done else None
                if done or (self._ending and wait is None):  # given up, but the next one gets its try too
                    self._waiting.popleft()
                    self._changed.notify_all()
                    shutil.rmtree(job.folder, ignore_errors=True)
                elif self._ending:
                    self._changed.wait(wait)
                elif self._at_once:
                    self._at_once = False
                else:  # a newer checkpoint, or the end of the run, is a reason to try at once
                    self._changed.wait(min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT))

    def _next(self) -> Job | None:
        with self._changed:
            if not self._waiting:
                self._thread = None
                return None
            self._begun += 1
            return self._waiting[0]

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
            told, self.failure, self._last_failed = self.failure, cause(error.__cause__ or error), self._begun
            self._changed.notify_all()
        if told is None:
            goes_on = "" if self._ending else "Training goes on; "
            goes_on += "the push is tried again until it succeeds"
            logger.warning("Pushing to %s failed (%s). %s.", self.repository.name, self.failure, goes_on)

    def _upload(self, job: Job) -> None:
        repository = self.repository
        if not repository.verified:
            repository.verify()
        api = repository.api()
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


def quiet_client() -> None:
    """Keep the client's bars out of the training's, and its retries untold: a push that fails is told once, here."""
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _tag(api: HfApi, name: str, tag: str, commit: str) -> None:
    """Names a commit; a tag of an earlier attempt, or of a run that was taken up again before it, moves."""
    try:
        api.create_tag(name, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        api.delete_tag(name, tag=tag)
        api.create_tag(name, tag=tag, revision=commit)
