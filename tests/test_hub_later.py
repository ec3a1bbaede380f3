"""`trl-llava push`: what lies in a folder is pushed as the run itself would have pushed it."""

import json
import shutil
from pathlib import Path

import hub_server
import pytest
from test_hub_push import checkpoint, finished

from trl_llava import cli
from trl_llava.publish import push as hub_push
from trl_llava.publish.model_card import CardFacts
from trl_llava.run.manifest import write_manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that was stopped behind its second checkpoint."""
    run = tmp_path / "run"
    for step in (1, 2):
        folder = checkpoint(run, step)
        log = [{"step": one, "loss": 1.0 / one} for one in range(1, step + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
        write_manifest(folder)
    facts = CardFacts("sft", "org/base", {"dataset_name": "/home/me/rows.json"}, [], 0)
    facts.save(run)
    (run / "recipe.yaml").write_text(
        "dataset_name: /home/me/rows.json\nhub_strategy: checkpoint\nhub_model_id: tiny\n"
    )
    (run / "versions.json").write_text('{"torch": "1.2.3"}')
    return run


def test_a_run_that_was_stopped(hub: hub_server.Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(run)]) == 0
    repo = hub.repos["models", "tester/tiny"]
    assert sorted(repo.tags) == ["checkpoint-1", "checkpoint-2"]
    assert capsys.readouterr().out == (
        f"Pushed checkpoint-1, checkpoint-2: {hub.url}/tester/tiny/commit/{repo.branches['main']}\n"
    )
    files = hub.files("tester/tiny")
    assert files["last-checkpoint/optimizer.pt"] == b"optimizer.pt 2" and files["recipe.yaml"].startswith(b"# The res")
    card = files["README.md"].decode()
    assert "base_model: org/base" in card and '"tester/tiny")' in card and "| `dataset_name` | rows.json |" in card
    assert "- torch: 1.2.3" in card
    assert not any(b"/home/me" in content for content in files.values())
    assert not (run / ".hub").exists()
    assert cli.main(["push", str(run)]) == 0
    assert capsys.readouterr().out == f"tester/tiny has the last checkpoint of {run} already.\n"


def test_what_is_there_stays(hub: hub_server.Hub, run: Path) -> None:
    kept = run.parent / "kept"
    shutil.move(run / "checkpoint-2", kept)
    assert cli.main(["push", str(run)]) == 0
    first = hub.repos["models", "tester/tiny"].tags["checkpoint-1"]
    shutil.move(kept, run / "checkpoint-2")
    (finished(run) / "adapter_model.safetensors").write_bytes(b"the end")
    (run / "recipe.yaml").write_text(
        "dataset_name: /home/me/rows.json\nhub_strategy: every_save\nhub_model_id: tiny\n"
    )
    assert cli.main(["push", str(run)]) == 0
    repo = hub.repos["models", "tester/tiny"]
    assert repo.tags["checkpoint-1"] == first and repo.titles[-2:] == [
        "Training in progress, step 2",
        "End of training",
    ]
    assert hub.files("tester/tiny")["adapter_model.safetensors"] == b"the end"


def test_one_checkpoint_to_another_place(hub: hub_server.Hub, run: Path) -> None:
    words = ["--hub_model_id", "org/other", "--hub_private_repo", "true", "--hub_revision", "tries"]
    assert cli.main(["push", str(run / "checkpoint-1"), *words]) == 0
    repo = hub.repos["models", "org/other"]
    assert repo.private and list(repo.tags) == ["checkpoint-1"] and "recipe.yaml" in repo.at("tries")[1]
    assert set(repo.at("main")[1]) == {".gitattributes"}


def test_the_end_alone(hub: hub_server.Hub, run: Path) -> None:
    (run / "recipe.yaml").write_text("hub_strategy: end\n")
    finished(run)
    (run / "recipe.yaml").write_text("hub_strategy: end\n")
    assert cli.main(["push", str(run)]) == 0
    assert not hub.repos["models", "tester/run"].tags


def test_what_cannot_be_pushed(
    hub: hub_server.Hub,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_push, "FIRST_WAIT", 0.01)

    def told(*words: str) -> str:
        assert cli.main(["push", *words]) != 0
        return capsys.readouterr().err

    assert "is neither the folder of a run nor one of its checkpoints: no card.json" in told(str(tmp_path))
    hub.add("tester/tiny", {"thesis.pdf": b"precious"})
    assert "holds something else" in told(str(run))
    hub.fail("POST", "/commit/", status=503, times=100)
    assert f"    trl-llava push {run} --hub_model_id tester/mine" in told(str(run), "--hub_model_id", "mine")
    hub.fail("POST", "/repos/create", times=100)
    assert "the Hub cannot be reached" in told(str(run))
    hub.faults.clear()
    (run / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"cut")
    assert "checkpoint-2 is damaged: adapter_model.safetensors" in told(str(run), "--hub_model_id", "new")
