"""The finished model of a run: it loads only when all of it is there, wherever the save was killed.

    output_dir/_finished.unfinished/    being written, or left by a run that was killed

Once all is written there and on the disk, its files move to `output_dir`. Nothing loads a folder without its config
files, so these go first from where they were and come last; all that loads in between is what is whole.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_llava.run.manifest import force_to_disk, sync_folder

CONFIG_FILES = ("adapter_config.json", "config.json")
"""Without one of them neither PEFT nor transformers loads a folder."""


def being_written(run_dir: Path) -> Path:
    """Where a finished model is written to before it has its place.

    Args:
        run_dir: Folder of the run.

    Returns:
        The folder.
    """
    return run_dir / "_finished.unfinished"


@contextmanager
def room_for_model(run_dir: Path) -> Iterator[None]:
    """An empty folder beside the finished model's place for as long as the block runs; for one process.

    Args:
        run_dir: Folder of the run.

    Yields:
        Nothing; the folder is `being_written(run_dir)`.
    """
    folder = being_written(run_dir)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_in(run_dir: Path, marker: str) -> None:
    """Give a model that is written its place.

    Args:
        run_dir: Folder of the run.
        marker: File that says that the run is finished; goes before anything changes. To write it is the caller's.
    """
    written = being_written(run_dir)
    force_to_disk(written)
    files = [path.relative_to(written) for path in written.rglob("*") if path.is_file()]
    configs = [file for file in files if file.name in CONFIG_FILES]
    for file in (Path(marker), *configs):  # of an earlier end of this run, whose weights are about to go
        (run_dir / file).unlink(missing_ok=True)
    for folder in {(run_dir / file).parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder)
    # Those within folders first: the run's own folder is what a user loads.
    for file in [
        *(file for file in files if file not in configs),
        *sorted(configs, key=lambda file: -len(file.parts)),
    ]:
        (written / file).replace(run_dir / file)
    for folder in {(run_dir / file).parent for file in files}:
        sync_folder(folder)
