"""The checkpoints of a run: written beside their place, renamed when whole, found again, and the oldest removed.

    output_dir/checkpoint-4/                           whole, with a manifest.json
    output_dir/_checkpoint-6.unfinished/checkpoint-6/  being written, or left by a run that was killed
    output_dir/_checkpoint-4.replaced/                 while a new checkpoint-4 takes its place
    output_dir/_checkpoint-2.removed/                  being removed
    output_dir/_checkpoint-8.given-up/                 of a run that was resumed from an earlier one

The names begin with an underscore because pushes to the Hub leave such names out.
"""

import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from trl_llava.errors import NotFoundError
from trl_llava.run.atomic_files import sync_path
from trl_llava.run.manifest import DamagedCheckpointError, check_deepspeed_files, check_manifest, write_manifest

OnDamaged = Literal["error", "previous"]
_WHOLE = re.compile(r"checkpoint-(\d+)")
_GIVEN_UP = re.compile(r"_checkpoint-(\d+)\.given-up")
_LEFTOVER = re.compile(r"_(checkpoint-\d+|finished)\.(unfinished|replaced|removed)")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
logger = logging.getLogger(__name__)


class NoCheckpointError(NotFoundError):
    """There is no checkpoint that a run can resume from."""

    exit_status = 2


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 if the name has none."""
    match = _WHOLE.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, not yet checked for damage, the last step last."""
    found = [path for path in run_dir.iterdir() if path.is_dir()] if run_dir.is_dir() else []
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def checkpoint_to_resume(run_dir: Path, wanted: str | bool, on_damaged: OnDamaged = "error") -> Path:
    """The checkpoint that `resume_from_checkpoint` names (`True`: the last one in `run_dir`), found safe to load."""
    checkpoint = find_checkpoint(run_dir, on_damaged) if wanted is True else Path(str(wanted))
    if not checkpoint.is_dir():
        raise NoCheckpointError(f"`resume_from_checkpoint`: there is no folder {checkpoint}")
    if not (checkpoint / "trainer_state.json").is_file():
        raise NoCheckpointError(
            f"`resume_from_checkpoint`: {checkpoint} is not a checkpoint (it has no trainer_state.json)"
        )
    if wanted is not True:
        check_manifest(checkpoint)
    check_deepspeed_files(checkpoint)
    # Without them transformers would start with a fresh optimizer, silently.
    if not any(any(checkpoint.glob(name)) for name in _OPTIMIZERS):
        raise NoCheckpointError(
            f"{checkpoint} has no optimizer.pt (was it written with `save_only_model: true`?), so a run cannot resume "
            "from it. Start a new run with its adapter or model"
        )
    return checkpoint


def find_checkpoint(run_dir: Path, on_damaged: OnDamaged = "error") -> Path:
    """The last undamaged checkpoint; with "error" it must be the last of all."""
    found = checkpoints(run_dir)
    if not found:
        raise NoCheckpointError(f"`resume_from_checkpoint`: {run_dir} holds no checkpoint-*; leave it out to start")
    problems: list[str] = []
    while found:
        checkpoint = found.pop()
        try:
            check_manifest(checkpoint)
        except DamagedCheckpointError as error:
            problems.append(str(error))
            if on_damaged == "error" and found:
                raise DamagedCheckpointError(
                    f"{error}. Restore that file, or set `on_damaged_checkpoint: previous` to resume from the last "
                    f"undamaged one before it ({found[-1].name} comes next)"
                ) from None
        else:
            for problem in problems:
                logger.warning("%s. Resuming from %s, see `on_damaged_checkpoint`.", problem, checkpoint.name)
            return checkpoint
    raise DamagedCheckpointError(f"{problems[0]}. No other one is whole: restore that file, or start a new run")


def unfinished(run_dir: Path, step: int) -> Path:
    """What stands in for the run's folder while a checkpoint is written: the checkpoint is a folder in it."""
    return run_dir / f"_checkpoint-{step}.unfinished"


def start_checkpoint(run_dir: Path, step: int) -> None:
    """Make an empty folder to write a checkpoint to."""
    discard_checkpoint(run_dir, step)
    (unfinished(run_dir, step) / f"checkpoint-{step}").mkdir(parents=True)


def discard_checkpoint(run_dir: Path, step: int) -> None:
    """Remove what was written of a checkpoint."""
    shutil.rmtree(unfinished(run_dir, step), ignore_errors=True)


def finish_checkpoint(run_dir: Path, step: int) -> Path:
    """Describe what was written in a manifest, and move it to its place."""
    written = unfinished(run_dir, step) / f"checkpoint-{step}"
    target = run_dir / written.name
    write_manifest(written)
    replaced = run_dir / f"_{target.name}.replaced"
    if target.exists():  # damaged, or of a run that was resumed from an earlier one
        target.rename(replaced)
    written.rename(target)
    sync_path(run_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    discard_checkpoint(run_dir, step)
    return target


def clear_leftovers(run_dir: Path) -> None:
    """Remove what a killed run has left half-written or half-removed."""
    for path in sorted(run_dir.iterdir()) if run_dir.is_dir() else []:
        if (match := _LEFTOVER.fullmatch(path.name)) is None:
            continue
        if match[2] == "replaced" and not (run_dir / match[1]).exists():
            path.rename(run_dir / match[1])  # killed before the new one could take its place
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name was left by a killed run."""
    return _LEFTOVER.fullmatch(name) is not None


def set_later_aside(run_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which is about to be saved by a run that was resumed from before them.

    Under their own names, the next resume would take the last of them.
    """
    for path in checkpoints(run_dir):
        if step_of(path) > step:
            aside = run_dir / f"_{path.name}.given-up"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("%s was given up by resuming this run from before it: it is now %s.", path, aside)


def remove_oldest(run_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Leave at most `limit` checkpoints (None or 0: any number), `keep` among them; given-up ones go first."""
    kept = {path.resolve() for path in keep}
    given_up = sorted(path for path in run_dir.iterdir() if _GIVEN_UP.fullmatch(path.name))
    others = given_up + [path for path in checkpoints(run_dir) if path.resolve() not in kept]
    surplus = len(others) + len(kept) - limit if limit else 0
    for path in others[: max(surplus, 0)]:
        # Under its own name, one that is half removed would pass for one that is damaged.
        removed = path.rename(run_dir / f"_{path.name.removeprefix('_').removesuffix('.given-up')}.removed")
        shutil.rmtree(removed, ignore_errors=True)
