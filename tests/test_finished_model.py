"""A final save that is cut short leaves no half of a model that loads, and the next one completes it."""

import os
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_folders import killed_at
from test_safe_checkpoints import build

from trl_llava.run import finished_model, output_dir
from trl_llava.run.checkpoint_folders import checkpoints, clear_leftovers, is_leftover
from trl_llava.run.disk_full import DiskFullError
from trl_llava.run.finished_model import being_written, move_in, room_for_model
from trl_llava.run.manifest import check_manifest

FILES = ("adapter_model.safetensors", "adapter_config.json")


def save(run_dir: Path, text: str) -> None:
    with room_for_model(run_dir):
        for part in ("", "value_model"):
            (being_written(run_dir) / part).mkdir(exist_ok=True)
            for name in FILES:
                (being_written(run_dir) / part / name).write_text(text)
        move_in(run_dir, "trainer_state.json")
        (run_dir / "trainer_state.json").write_text(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("again", [False, True], ids=["the first", "one in place of another"])
def test_killed_anywhere_all_that_loads_is_whole(tmp_path: Path, again: bool) -> None:
    kills, seen = 0, set()
    for call in range(200):
        run_dir = tmp_path / str(call)
        run_dir.mkdir()
        if again:
            save(run_dir, "old")
        killed = killed_at(call, lambda folder=run_dir: save(folder, "new"))
        assert all(is_leftover(path.name) for path in run_dir.iterdir() if path.name.startswith("_"))
        clear_leftovers(run_dir)
        for folder in (run_dir, run_dir / "value_model"):
            found = {name: (folder / name).read_text() for name in FILES if (folder / name).is_file()}
            if "adapter_config.json" in found:
                assert len(found) == 2 and len({*found.values()}) == 1
            seen.add(found.get("adapter_config.json"))
        if (run_dir / "trainer_state.json").is_file():
            assert {path.read_text() for path in run_dir.rglob("*") if path.is_file()} <= {"old", "new"}
            assert len({*contents(run_dir).values()} - {b""}) == 1
        save(run_dir, "new")
        assert contents(run_dir) == dict.fromkeys(contents(run_dir), b"new") and len(contents(run_dir)) == 5
        if not killed:
            break
        kills += 1
    assert kills > 15 and seen == ({"old", "new", None} if again else {"new", None})


@pytest.fixture
def trained(tiny_llava_dir: Path, tmp_path: Path) -> Any:
    """A PPO run that has ended and not yet left its model."""
    trainer = build("ppo", tiny_llava_dir, tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer.create_model_card = lambda **kwargs: (tmp_path / "run" / "README.md").write_text("ours")
    trainer.train()
    return trainer


def test_it_is_what_the_trainer_saves(trained: Any, tmp_path: Path, capsys: Any) -> None:
    output_dir.finish(trained, None)
    assert f"finished after step 3; all of it is in {tmp_path / 'run'}\n" in capsys.readouterr().out
    finished = {name: text for name, text in contents(tmp_path / "run").items() if not name.startswith("checkpoint-")}
    trained.save_model(str(tmp_path / "saved"), _internal_call=True)
    saved = contents(tmp_path / "saved")
    assert finished.keys() - saved.keys() == {"trainer_state.json"} and saved.keys() - finished.keys() == set()
    assert {name for name in saved if finished[name] != saved[name]} == {"README.md"}
    assert finished["README.md"] == b"ours"
    assert "value_model/adapter_config.json" in finished and "adapter_config.json" in finished


def test_no_pickle_is_left(tiny_llava_dir: Path, tmp_path: Path) -> None:
    trainer = build("sft", tiny_llava_dir, tmp_path, max_steps=1, peft_config=None)
    trainer.create_model_card = lambda **kwargs: None
    trainer.train()
    output_dir.finish(trainer, None)
    assert {"model.safetensors", "config.json", "trainer_state.json"} <= contents(tmp_path).keys()
    assert not {"training_args.bin", "README.md"} & contents(tmp_path).keys()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("file", ["value_model/adapter_config.json", "tokenizer_config.json", "trainer_state.json"])
def test_a_full_disk_leaves_what_was_there(trained: Any, tmp_path: Path, monkeypatch: Any, file: str) -> None:
    run = tmp_path / "run"

    def no_room() -> None:
        folder = being_written(run)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).symlink_to("/dev/full")

    real = trained.save_model
    before = contents(run)
    with monkeypatch.context() as patched:
        patched.setattr(trained, "save_model", lambda *args, **kwargs: (no_room(), real(*args, **kwargs)))
        if file == "trainer_state.json":  # the model has its place by then
            patched.setattr(trained, "save_model", real)
            patched.setattr(trained, "create_model_card", lambda **kwargs: no_room())
        with pytest.raises(DiskFullError) as error:
            output_dir.finish(trained, None)
    assert f"cannot write the finished model: the disk of {run} is full" in str(error.value)
    assert f"{run / 'checkpoint-3'} is whole and was not touched" in str(error.value)
    if file == "trainer_state.json":
        assert "adapter_config.json" in contents(run) and "trainer_state.json" not in contents(run)
    else:
        assert contents(run) == before
    for checkpoint in checkpoints(run):
        check_manifest(checkpoint)
    output_dir.finish(trained, None)
    whole = contents(run)
    monkeypatch.setattr(trained, "save_model", lambda *args, **kwargs: (no_room(), real(*args, **kwargs)))
    if file != "trainer_state.json":
        with pytest.raises(DiskFullError):
            output_dir.finish(trained, None)
        assert contents(run) == whole  # the earlier end of the run


def test_it_moves_only_what_is_on_the_disk(tmp_path: Path, monkeypatch: Any) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), real_sync(fd)))
    monkeypatch.setattr(finished_model.Path, "replace", lambda a, b: (events.append(b.name), real_replace(a, b))[1])
    save(tmp_path, "new")
    moved = [event for event in events if event != "fsync"]
    # four files and two folders, then the two folders that the names go to
    assert events[:8] == ["fsync"] * 8 and len(events) == 14
    assert moved[-2:] == ["adapter_config.json"] * 2 and len(moved) == 4
