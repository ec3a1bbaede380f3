"""Pushes a run to the Hub while it trains: from a thread, again until it succeeds, with one warning when it fails.

huggingface_hub's background jobs (`run_as_future`, `CommitScheduler`) are not tried again, and a Hub that hangs keeps
the process from ending.
"""

import logging
import shlex
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_utils import HubStrategy

from trl_llava.errors import ExplainedError
from trl_llava.hub.lookup import first_line
from trl_llava.publish.repository import Repository
from trl_llava.publish.shareable import lay_out, lay_out_resumable, put
from trl_llava.run.output_dir import RECIPE_FILE, VERSIONS_FILE

logger = logging.getLogger(__name__)

STAGING = ".hub"
"""Folder in `output_dir` with what waits to be pushed: a checkpoint may be deleted before it is."""

FIRST_WAIT, LONGEST_WAIT = 10.0, 600.0
"""Seconds between two attempts, doubled from one to the next."""

LAST_ATTEMPTS = 4
"""How often a push may fail at the end of a run before it is given up."""

_BESIDE = ("README.md", "curves.png", RECIPE_FILE, VERSIONS_FILE)


class PushError(ExplainedError, RuntimeError):
    """A run that could not be pushed; it is whole in its folder."""


@dataclass(eq=False)
class Job:
    """One commit: the folder that it holds, its title, its tag, and the folder on the Hub whose old files go."""

    folder: Path
    message: str
    tag: str | None = None
    replaces: str | None = None


class HubPush:
    """The pushes of one run; with `keep_all` (`hub_always_push`) none is left out because a newer one waits."""

    def __init__(self, repository: Repository, output_dir: Path, strategy: HubStrategy, keep_all: bool) -> None:
        self.repository, self.output_dir, self.strategy, self.keep_all = repository, output_dir, strategy, keep_all
        self.failure: str | None = None
        """Why the last attempt failed; None once one has succeeded."""
        self.url: str | None = None
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._failures = 0  # in a row
        self._thread: threading.Thread | None = None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what fails is logged here, once
        shutil.rmtree(output_dir / STAGING, ignore_errors=True)  # of a run that was killed

    @property
    def command(self) -> str:
        """The command line that pushes this run once the process is gone."""
        return shlex.join(["trl-llava", "push", str(self.output_dir), "--hub_model_id", self.repository.name])

    @property
    def waiting(self) -> list[str]:
        """Names of the checkpoints that have not been pushed yet."""
        return [job.folder.name for job in self._waiting]

    def checkpoint(self, folder: Path, step: int) -> None:
        """Push a finished checkpoint from the thread, without waiting for the Hub; `InputError` if it has a token."""
        whole = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        inside = whole.get(self.strategy)
        staged = self._stage(folder, folder.name)
        if inside is not None:
            lay_out_resumable(folder, staged / inside)
        self._submit(Job(staged, f"Training in progress, step {step}", folder.name, inside))

    def end(self, message: str = "End of training") -> str:
        """Push the finished run, wait for all that is under way, and return where it is: `PushError` if it fails."""
        self._submit(Job(self._stage(self.output_dir, "end"), message))
        return self.finish()

    def finish(self) -> str:
        """Wait for all that is under way, and return where it is; what fails too often is given up: `PushError`."""
        left = self.settle(LAST_ATTEMPTS)
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()
        shutil.rmtree(self.output_dir / STAGING, ignore_errors=True)
        if left:
            raise PushError(
                f"the run is whole in {self.output_dir}, but {self.repository.name} did not take it: {self.failure}. "
                f"Push it with:\n    {self.command}"
            )
        return str(self.url)

    def settle(self, attempts: int, seconds: float | None = None) -> list[str]:
        """Wait until all is pushed, or `attempts` have failed, or the time is over; returns what is still waiting."""
        with self._changed:
            self._failures = 0
            self._changed.notify_all()  # an attempt at once
            self._changed.wait_for(lambda: not self._waiting or self._failures >= attempts, timeout=seconds)
            return self.waiting

    def _stage(self, source: Path, name: str) -> Path:
        staged = self.output_dir / STAGING / name
        shutil.rmtree(staged, ignore_errors=True)
        lay_out(source, staged)
        for beside in _BESIDE:
            if (self.output_dir / beside).is_file():
                put(str(self.output_dir / beside), str(staged / beside))
        if self.repository.recipe is not None:
            (staged / RECIPE_FILE).write_text(self.repository.recipe.to_yaml(), encoding="utf-8")
        return staged

    def _submit(self, job: Job) -> None:
        with self._changed:
            # The first one has been begun; of those behind it only the newest matters, unless all shall be kept.
            while len(self._waiting) > 1 and not self.keep_all:
                left_out = self._waiting.pop()
                logger.info("%s is not pushed: a newer one came first.", left_out.folder.name)
                shutil.rmtree(left_out.folder, ignore_errors=True)
            self._waiting.append(job)
            self._changed.notify_all()
            if self._thread is None:
                # A daemon: a Hub that hangs must not keep a run that has failed from ending.
                self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._upload(job)
            except Exception as error:  # whatever it is, it must not end the training; at the end it is raised
                self._failed(error)
            else:
                self._done(job)

    def _next(self) -> Job | None:
        with self._changed:
            if not self._waiting:
                self._thread = None
                return None
            return self._waiting[0]

    def _failed(self, error: Exception) -> None:
        with self._changed:
            first, self.failure = self.failure is None, first_line(error.__cause__ or error)
            if first:
                name = self.repository.name
                logger.warning("Pushing to %s failed (%s). It is tried again; training goes on.", name, self.failure)
            self._failures += 1
            self._changed.notify_all()
            # A newer checkpoint, or the end of the run, is a reason to try at once.
            self._changed.wait(min(FIRST_WAIT * 2 ** (self._failures - 1), LONGEST_WAIT))

    def _done(self, job: Job) -> None:
        with self._changed:
            if self.failure is not None:
                logger.warning("Pushing to %s works again.", self.repository.name)
            self.failure, self._failures = None, 0
            shutil.rmtree(job.folder, ignore_errors=True)
            if job in self._waiting:  # not if it was given up meanwhile
                self._waiting.remove(job)
            self._changed.notify_all()

    def _upload(self, job: Job) -> None:
        repository = self.repository
        if not repository.verified:
            repository.verify()
        commit = repository.api.upload_folder(
            repo_id=repository.name,
            folder_path=job.folder,
            commit_message=job.message,
            revision=repository.revision,
            delete_patterns=None if job.replaces is None else f"{job.replaces}/*",
        )
        if job.tag is not None:
            _tag(repository.api, repository.name, job.tag, commit.oid)
        self.url = commit.commit_url


def _tag(api: HfApi, name: str, tag: str, commit: str) -> None:
    """Tags a commit; the tag of an earlier attempt, or of a run that was resumed from before it, moves."""
    try:
        api.create_tag(name, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        api.delete_tag(name, tag=tag)
        api.create_tag(name, tag=tag, revision=commit)
