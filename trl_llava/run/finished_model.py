"""The finished model of a run: it loads only when all of it is there, wherever the save was killed.

    output_dir/_finished.unfinished/    being written, or left by a run that was killed

Once all is written there and on the disk, its files move to `output_dir`. Nothing loads a folder without its config
files, so those of an earlier end of the run go first and the new ones come last.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_llava.run.atomic_files import files_in, sync_path, sync_to_disk

CONFIG_FILES = ("adapter_config.json", "config.json")
"""Without one of them neither PEFT nor transformers loads a folder."""


def being_written(run_dir: Path) -> Path:
    """Where a finished model is written before it has its place."""
    return run_dir / "_finished.unfinished"


@contextmanager
def room_for_model(run_dir: Path) -> Iterator[None]:
    """Make `being_written(run_dir)`, empty, for as long as the block runs; for one process."""
    folder = being_written(run_dir)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_in(run_dir: Path, marker: str) -> None:
    """Move a written model to its place; `marker`, the file that says that the run is finished, goes first of all."""
    written = being_written(run_dir)
    sync_to_disk(written)
    files = [path.relative_to(written) for path in files_in(written)]
    configs = [file for file in files if file.name in CONFIG_FILES]
    for file in (Path(marker), *configs):
        (run_dir / file).unlink(missing_ok=True)
    folders = {(run_dir / file).parent for file in files}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        sync_path(folder)
    # Of the configs those in subfolders first: the run's own folder is what a user loads.
    configs.sort(key=lambda file: -len(file.parts))
    for file in [*(file for file in files if file not in configs), *configs]:
        (written / file).replace(run_dir / file)
    for folder in folders:
        sync_path(folder)
