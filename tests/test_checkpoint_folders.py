"""Wherever a save is killed, a whole checkpoint is found afterwards."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trl_llava.errors import NotFoundError
from trl_llava.run import checkpoint_folders
from trl_llava.run.checkpoint_folders import (
    checkpoints,
    clear_leftovers,
    find_checkpoint,
    finish_checkpoint,
    remove_oldest,
    set_later_aside,
    start_checkpoint,
    unfinished,
)
from trl_llava.run.manifest import DamagedCheckpointError, check_manifest


def save(run_dir: Path, step: int, limit: int | None = None, text: str = "weights") -> None:
    start_checkpoint(run_dir, step)
    folder = unfinished(run_dir, step) / f"checkpoint-{step}"
    (folder / "value_model").mkdir()
    for name in ("a", "value_model/b"):
        (folder / name).write_text(f"{text} of {step}")
    set_later_aside(run_dir, step)
    remove_oldest(run_dir, limit, keep=[finish_checkpoint(run_dir, step)])


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def killed_at(call: int, work: Callable[[], None]) -> bool:
    """Run something in a process that is killed before its n-th change of the disk; False if it ended before."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = call

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return wrapped

    for owner, name in (
        *((os, name) for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync")),
        *((Path, name) for name in ("rename", "write_text", "mkdir")),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize("again", [False, True], ids=["a new one", "one in place of another"])
def test_a_save_killed_anywhere_leaves_whole_checkpoints_alone(tmp_path: Path, again: bool) -> None:
    kills = 0
    for call in range(200):
        run_dir = tmp_path / str(call)
        run_dir.mkdir()
        save(run_dir, 4 if again else 2)
        killed = killed_at(call, lambda folder=run_dir: save(folder, 4, limit=1))
        clear_leftovers(run_dir)
        assert {path.name for path in checkpoints(run_dir)} == set(names(run_dir)) <= {"checkpoint-2", "checkpoint-4"}
        for path in checkpoints(run_dir):
            check_manifest(path)
        assert (find_checkpoint(run_dir) / "a").read_text().startswith("weights of ")
        if not killed:
            assert names(run_dir) == ["checkpoint-4"]
            break
        kills += 1
        shutil.rmtree(run_dir)
    assert kills > 10


def test_the_last_one_is_found_and_damage_is_named(tmp_path: Path, caplog: Any) -> None:
    with pytest.raises(NotFoundError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    for step in (2, 4, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoint-12").write_text("a file")
    assert find_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "value_model" / "b").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint-10 is damaged: value_model/b: .*checkpoint-4 comes"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoint-4" / "a").write_text("changed of 4")
    assert find_checkpoint(tmp_path, "previous").name == "checkpoint-2"
    warned = [record.getMessage() for record in caplog.records]
    assert ["checkpoint-10 is damaged" in text for text in warned] == [True, False]
    (tmp_path / "checkpoint-2" / "a").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint-10 is damaged: .* No other one is whole"):
        find_checkpoint(tmp_path, "previous")


def test_only_older_ones_make_room_and_the_given_up_ones_first(tmp_path: Path, caplog: Any) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    save(tmp_path, 5)  # of a run that went on from checkpoint-4
    assert "checkpoint-8 was given up" in caplog.text
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [
        *("_checkpoint-6.given-up", "_checkpoint-8.given-up", "checkpoint-2", "checkpoint-4", "checkpoint-5")
    ]
    assert find_checkpoint(tmp_path).name == "checkpoint-5"  # and not the last step of the run that was given up
    newest, best = tmp_path / "checkpoint-5", tmp_path / "checkpoint-2"
    remove_oldest(tmp_path, 4, keep=[newest])
    assert names(tmp_path) == ["_checkpoint-8.given-up", "checkpoint-2", "checkpoint-4", "checkpoint-5"]
    remove_oldest(tmp_path, 3, keep=[newest])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    remove_oldest(tmp_path, 1, keep=[newest, best])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    remove_oldest(tmp_path, None, keep=[newest])
    assert len(checkpoints(tmp_path)) == 2


def test_nothing_moves_before_all_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), real(fd)))
    rename = Path.rename
    monkeypatch.setattr(checkpoint_folders.Path, "rename", lambda a, b: (events.append("rename"), rename(a, b))[1])
    save(tmp_path, 2)
    # two files, the manifest, two folders; then the folder that the name is in
    assert events == ["fsync"] * 5 + ["rename", "fsync"]
