"""The checkpoints of a run: written beside their place, renamed when whole, found again, and the oldest removed.

    output_dir/checkpoint-4/                           whole, with a manifest.json
    output_dir/_checkpoint-6.unfinished/checkpoint-6/  being written, or left by a run that was killed
    output_dir/_checkpoint-4.replaced/                 while a new checkpoint-4 takes its place
    output_dir/_checkpoint-2.removed/                  being removed
    output_dir/_checkpoint-8.given-up/                 of a run that was taken up again from an earlier one

The names begin with an underscore because pushes to the Hub leave such names out.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from trl_llava.errors import NotFoundError
from trl_llava.run.manifest import DamagedCheckpointError, check_manifest, sync_folder, write_manifest

OnDamaged = Literal["error", "previous"]
_WHOLE = re.compile(r"checkpoint-(\d+)")
_GIVEN_UP = re.compile(r"_checkpoint-(\d+)\.given-up")
_LEFTOVER = re.compile(r"_(checkpoint-\d+|finished)\.(unfinished|replaced|removed)")
logger = logging.getLogger(__name__)


def unfinished(run_dir: Path, step: int) -> Path:
    """The folder that takes the place of the run's folder while a checkpoint is written.

    Args:
        run_dir: Folder of the run.
        step: Step of the checkpoint.

    Returns:
        The folder; the checkpoint's own is `checkpoint-STEP` in it.
    """
    return run_dir / f"_checkpoint-{step}.unfinished"


def start_checkpoint(run_dir: Path, step: int) -> None:
    """Make an empty folder to write a checkpoint to.

    Args:
        run_dir: Folder of the run.
        step: Step of the checkpoint.
    """
    discard_checkpoint(run_dir, step)
    (unfinished(run_dir, step) / f"checkpoint-{step}").mkdir(parents=True)


def finish_checkpoint(run_dir: Path, step: int) -> Path:
    """Hash what was written, and move it to its place.

    Args:
        run_dir: Folder of the run.
        step: Step of the checkpoint.

    Returns:
        The checkpoint.
    """
    written = unfinished(run_dir, step) / f"checkpoint-{step}"
    target = run_dir / written.name
    write_manifest(written)
    replaced = run_dir / f"_{target.name}.replaced"
    if target.exists():  # damaged, or of a run that went on from an earlier one
        target.rename(replaced)
    written.rename(target)
    sync_folder(run_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    discard_checkpoint(run_dir, step)
    return target


def discard_checkpoint(run_dir: Path, step: int) -> None:
    """Remove what was written of a checkpoint.

    Args:
        run_dir: Folder of the run.
        step: Step of the checkpoint.
    """
    shutil.rmtree(unfinished(run_dir, step), ignore_errors=True)


def clear_leftovers(run_dir: Path) -> None:
    """Remove what a killed run has left half-written or half-removed.

    Args:
        run_dir: Folder of the run; may be absent.
    """
    for path in sorted(run_dir.iterdir()) if run_dir.is_dir() else []:
        if (match := _LEFTOVER.fullmatch(path.name)) is None:
            continue
        if match[2] == "replaced" and not (run_dir / match[1]).exists():
            path.rename(run_dir / match[1])  # killed before the new one could take its place
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_leftover(name: str) -> bool:
    """Whether a name is that of something a killed run has left.

    Args:
        name: Name in the folder of a run.

    Returns:
        `True` if so.
    """
    return _LEFTOVER.fullmatch(name) is not None


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint.

    Args:
        checkpoint: Its folder.

    Returns:
        The step, -1 if the name has none.
    """
    match = _WHOLE.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints in a folder.

    Args:
        run_dir: Folder of the run; may be absent.

    Returns:
        Their folders, the last step last. Whether they are undamaged has not been looked at.
    """
    found = [path for path in run_dir.iterdir() if path.is_dir()] if run_dir.is_dir() else []
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def find_checkpoint(
    run_dir: Path, on_damaged: OnDamaged = "error", say: Callable[[str], None] = logger.warning
) -> Path:
    """The checkpoint that a run goes on from.

    Args:
        run_dir: Folder of the run.
        on_damaged: What to do if the last one is damaged: 'error', or take the one before.
        say: Told which damaged ones were passed over.

    Returns:
        The last undamaged checkpoint.

    Raises:
        NotFoundError: If there is none.
        DamagedCheckpointError: If the last one is damaged and `on_damaged` is 'error', or if all are damaged.
    """
    found = checkpoints(run_dir)
    if not found:
        raise NotFoundError(f"{run_dir} holds no checkpoint-* to resume from")
    passed_over = []
    for checkpoint in reversed(found):
        try:
            check_manifest(checkpoint)
        except DamagedCheckpointError as error:
            passed_over.append(str(error))
            if on_damaged == "error":
                raise DamagedCheckpointError(
                    f"{error}. {_what_to_do(run_dir, found[: found.index(checkpoint)])}"
                ) from None
            continue
        for problem in passed_over:
            say(f"{problem}. Going on from {checkpoint.name}, as `on_damaged_checkpoint: previous` says.")
        return checkpoint
    raise DamagedCheckpointError(
        f"all {len(found)} checkpoints of {run_dir} are damaged, so it cannot go on; the last one: {passed_over[0]}"
    )


def _what_to_do(run_dir: Path, before: list[Path]) -> str:
    if not before:
        return f"There is none before it in {run_dir}: restore that file, or start a new run"
    return (
        f"Restore that file, or set `on_damaged_checkpoint: previous` to go on from the last undamaged one before it "
        f"({before[-1].name} comes next)"
    )


def give_up_later(run_dir: Path, step: int) -> None:
    """Set aside the checkpoints of later steps: a run that went on from an earlier one is not their run any more.

    Under their own names, the next resume would take the last of them for its own.

    Args:
        run_dir: Folder of the run.
        step: Step of a checkpoint that is about to get its place.
    """
    for path in checkpoints(run_dir):
        if step_of(path) > step:
            aside = run_dir / f"_{path.name}.given-up"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning(
                "%s is of a part of this run that was given up by going on from before it: it is now %s.", path, aside
            )


def remove_oldest(run_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Remove checkpoints until no more are left than may be; those that were given up go first.

    Args:
        run_dir: Folder of the run.
        limit: How many may be left; None or 0 for any number.
        keep: Those that stay whatever the limit; the newest, which is whole, is among them.
    """
    kept = {path.resolve() for path in keep}
    given_up = sorted(path for path in run_dir.iterdir() if _GIVEN_UP.fullmatch(path.name))
    others = given_up + [path for path in checkpoints(run_dir) if path.resolve() not in kept]
    surplus = len(others) + len(kept) - limit if limit else 0
    for path in others[: max(surplus, 0)]:
        # Under its own name, one that is half removed would pass for one that is damaged.
        path = path.rename(run_dir / f"_{path.name.removeprefix('_').removesuffix('.given-up')}.removed")
        shutil.rmtree(path, ignore_errors=True)
