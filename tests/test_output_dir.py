"""A run's folder: another run is never touched, and what is written can be trusted."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import hub_server
import pytest

from trl_llava import stage_run
from trl_llava.configs.recipe import make_parser
from trl_llava.run import atomic_files
from trl_llava.run.checkpoint_folders import NoCheckpointError
from trl_llava.run.manifest import DamagedCheckpointError, write_manifest
from trl_llava.run.output_dir import OutputDirError, claim, record
from trl_llava.stage_run import StageRun


def parse(folder: Path, *args: str) -> tuple[Any, Any]:
    words = ["--output_dir", str(folder), "--bf16", "false", "--use_cpu", *args]
    _, training_args, *_, recipe = make_parser("sft").parse(words)
    return training_args, recipe


def start(folder: Path, *args: str) -> None:
    parsed = parse(folder, *args)
    claim(*parsed)
    record(*parsed)


def finish(folder: Path) -> dict[str, bytes]:
    """Pretends that a run got as far as a checkpoint; returns what must not change."""
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "optimizer.pt").write_bytes(b"")
    write_manifest(checkpoint)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_gets_recipe_and_versions(tmp_path: Path) -> None:
    start(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["recipe.yaml", "versions.json"]
    versions = json.loads((tmp_path / "a" / "b" / "versions.json").read_text())
    assert {"python", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "trl_llava"} <= set(versions)
    assert versions["trl"] == importlib.metadata.version("trl")


def test_the_recipe_of_a_resumed_run_repeats_it_from_its_start(tmp_path: Path) -> None:
    start(tmp_path / "run")
    finish(tmp_path / "run")
    start(tmp_path / "run", "--resume_from_checkpoint", "true")
    assert "resume_from_checkpoint" not in (tmp_path / "run" / "recipe.yaml").read_text()


def test_nothing_is_written_before_training_starts(tmp_path: Path) -> None:
    assert claim(*parse(tmp_path / "run")) is None
    assert list((tmp_path / "run").iterdir()) == []


def test_another_run_is_refused_and_named(tmp_path: Path) -> None:
    start(tmp_path / "run")
    before = finish(tmp_path / "run")
    with pytest.raises(OutputDirError, match=r"holds another run.*`learning_rate` \(2e-05 there, 0.1 now\)") as error:
        claim(*parse(tmp_path / "run", "--learning_rate", "0.1"))
    assert "Choose another `output_dir`" in str(error.value)
    assert contents(tmp_path / "run") == before


def test_a_field_that_the_first_version_did_not_know_counts_only_where_it_is_set(tmp_path: Path) -> None:
    start(tmp_path / "run")
    finish(tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("overlong:")]
    recipe.write_text("\n".join([*lines, "gone_since: 3"]))
    assert claim(*parse(tmp_path / "run", "--resume_from_checkpoint", "true"))
    with pytest.raises(OutputDirError, match=r"`overlong` \(None there, 'drop' now\)"):
        claim(*parse(tmp_path / "run", "--resume_from_checkpoint", "true", "--overlong", "drop"))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(OutputDirError, match="is not empty and no run of trl_llava"):
        claim(*parse(tmp_path))
    assert contents(tmp_path) == {str(tmp_path / "thesis.txt"): b"precious"}


def test_the_same_run_resumes_or_says_how(tmp_path: Path, capsys: Any) -> None:
    start(tmp_path / "run")
    before = finish(tmp_path / "run")
    with pytest.raises(OutputDirError, match=r"already holds this run: .*`resume_from_checkpoint: true`"):
        claim(*parse(tmp_path / "run"))
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    assert claim(*parse(tmp_path / "run", "--resume_from_checkpoint", "true")) == checkpoint
    assert claim(*parse(tmp_path / "run", "--resume_from_checkpoint", checkpoint)) == checkpoint
    assert capsys.readouterr().err == f"resuming from {checkpoint}\n" * 2
    assert contents(tmp_path / "run") == before


def test_a_run_that_died_before_its_first_checkpoint_starts_again_when_resumed(tmp_path: Path, capsys: Any) -> None:
    start(tmp_path / "run")
    (tmp_path / "run" / "completions").mkdir()
    (tmp_path / "run" / "completions" / "completions_00001.parquet").write_text("samples")
    leftover = tmp_path / "run" / "_checkpoint-2.unfinished" / "checkpoint-2"
    leftover.mkdir(parents=True)
    with pytest.raises(OutputDirError, match="or from the first step if there is none yet"):
        claim(*parse(tmp_path / "run"))
    assert leftover.is_dir()  # what is refused is not touched
    assert claim(*parse(tmp_path / "run", "--resume_from_checkpoint")) is None
    assert "holds no checkpoint of this run yet: starting at the first step" in capsys.readouterr().err
    assert not leftover.parent.exists() and (tmp_path / "run" / "completions").is_dir()


def test_it_does_so_on_the_hub_too(hub: hub_server.Hub, tmp_path: Path) -> None:
    words = ["--push_to_hub", "--hub_model_id", "run", "--output_dir", str(tmp_path / "run"), "--bf16", "false"]

    def begin(*more: str) -> StageRun:
        return stage_run.begin("sft", [*words, "--use_cpu", *more])

    killed = begin()
    assert killed.repository is not None and killed.repository.verified
    record(killed.training_args, killed.recipe)
    (tmp_path / "run" / "completions").mkdir()
    again = begin("--resume_from_checkpoint")  # the repository is its own
    assert again.checkpoint is None and again.repository is not None and again.repository.verified
    hub.fail("POST", "/repos/create", status=503, times=1)
    unreached = begin("--resume_from_checkpoint")
    assert unreached.repository is not None and not unreached.repository.verified


def test_a_run_with_a_full_disk_may_keep_fewer_checkpoints(tmp_path: Path) -> None:
    start(tmp_path / "run", "--save_total_limit", "5")
    finish(tmp_path / "run")
    words = ("--save_total_limit", "1", "--disable_tqdm", "--resume_from_checkpoint")
    assert claim(*parse(tmp_path / "run", *words)) == str(tmp_path / "run" / "checkpoint-3")


def test_a_finished_run_without_checkpoints_cannot_be_continued(tmp_path: Path) -> None:
    start(tmp_path / "run")
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    for words in ([], ["--resume_from_checkpoint", "true"]):
        with pytest.raises(OutputDirError, match="holds this run, finished, and no checkpoint-"):
            claim(*parse(tmp_path / "run", *words))


def test_a_damaged_checkpoint_stops_or_the_one_before_is_used(tmp_path: Path, caplog: Any) -> None:
    start(tmp_path / "run")
    finish(tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoint-5"
    damaged.mkdir()
    (damaged / "trainer_state.json").write_text("{}")
    write_manifest(damaged)
    (damaged / "trainer_state.json").write_text("{}}")
    resume = (tmp_path / "run", "--resume_from_checkpoint")
    with pytest.raises(DamagedCheckpointError) as error:
        claim(*parse(*resume))
    assert f"{damaged} is damaged: trainer_state.json: expected 2 bytes, found 3." in str(error.value)
    assert "set `on_damaged_checkpoint: previous`" in str(error.value) and "(checkpoint-3 comes next)" in str(
        error.value
    )
    before = claim(*parse(*resume, "--on_damaged_checkpoint", "previous"))
    assert before == str(tmp_path / "run" / "checkpoint-3")
    assert "Resuming from checkpoint-3" in caplog.text
    with pytest.raises(DamagedCheckpointError, match="expected 2 bytes, found 3"):
        claim(
            *parse(tmp_path / "run", "--resume_from_checkpoint", str(damaged), "--on_damaged_checkpoint", "previous")
        )


def test_a_checkpoint_from_elsewhere_may_start_a_run(tmp_path: Path) -> None:
    start(tmp_path / "old")
    finish(tmp_path / "old")
    checkpoint = str(tmp_path / "old" / "checkpoint-3")
    assert claim(*parse(tmp_path / "new", "--resume_from_checkpoint", checkpoint)) == checkpoint


def test_the_same_run_that_left_nothing_starts_again(tmp_path: Path) -> None:
    start(tmp_path / "run")
    start(tmp_path / "run")


def test_a_moved_folder_is_still_the_same_run(tmp_path: Path) -> None:
    start(tmp_path / "run")
    finish(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert claim(*parse(tmp_path / "moved", "--resume_from_checkpoint", "true")) is not None


@pytest.mark.parametrize("value", ["true", "nowhere"])
def test_missing_checkpoint_is_named(tmp_path: Path, value: str) -> None:
    with pytest.raises(NoCheckpointError, match=r"`resume_from_checkpoint`: .*(holds no|there is no)"):
        claim(*parse(tmp_path / "run", "--resume_from_checkpoint", value))


def test_unwritable_output_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match=r"cannot write into `output_dir` .*file/run: Not a directory. Choose"):
        claim(*parse(tmp_path / "file" / "run"))
    with pytest.raises(OutputDirError, match="`output_dir`"):
        claim(*parse(tmp_path / "file"))


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    atomic_files.write_atomically(path, "old")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(atomic_files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_files.write_atomically(path, "new")
    assert path.read_text() == "old"
