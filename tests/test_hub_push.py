"""A run is pushed as it trains, whatever the Hub does meanwhile, and nothing private goes with it."""

import json
import logging
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_server
import pytest
from huggingface_hub import snapshot_download
from transformers.trainer_utils import HubStrategy

from trl_llava.configs.recipe import Recipe
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments
from trl_llava.errors import InputError
from trl_llava.publish import push as hub_push
from trl_llava.publish.push import HubPush, PushError
from trl_llava.publish.repository import HubError, Repository, claim_repository
from trl_llava.publish.shareable import lay_out, without_paths
from trl_llava.publish.trainer import PushAtSaves
from trl_llava.run.manifest import check_manifest

RECIPE = Recipe({"learning_rate": 0.1, "dataset_name": "/home/me/rows.json", "output_dir": "/scratch/run"}, {})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_push, "FIRST_WAIT", 0.01)


def checkpoint(run: Path, step: int) -> Path:
    """What a save leaves behind."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights %d" % step * 100)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/base", "r": 2}))
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(folder), "global_step": step}))
    (folder / "README.md").write_text("PEFT's own")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(f"{name} {step}".encode())
    return folder


def finished(run: Path) -> Path:
    shutil.copytree(run / "checkpoint-2", run, dirs_exist_ok=True)
    (run / "README.md").write_text("---\nlibrary_name: peft\n---\n# the run")
    (run / "recipe.yaml").write_text(RECIPE.to_yaml())
    return run


def repository(**changes: Any) -> Repository:
    given = {
        "name": "tester/run",
        "revision": None,
        "private": None,
        "recipe": Recipe(without_paths(RECIPE.given), {}),
    }
    return Repository(**{**given, "onto_existing": False, **changes})


def pushed(
    run: Path,
    strategy: str = "every_save",
    *,
    steps: tuple[int, ...] = (1, 2),
    keep_all: bool = True,
    **changes: Any,
) -> HubPush:
    """Pushes some checkpoints."""
    run.mkdir(exist_ok=True)
    push = HubPush(repository(**changes), run, HubStrategy(strategy), keep_all)
    for step in steps:
        push.checkpoint(checkpoint(run, step), step)
    return push


def claim(tmp_path: Path, *, resuming: bool = False, onto: bool = False, **changes: Any) -> Repository | None:
    given = {
        "hub_model_id": "run",
        "hub_revision": None,
        "hub_private_repo": None,
        "output_dir": str(tmp_path / "out"),
    }
    args: Any = SimpleNamespace(**{**given, "push_to_hub": True, "process_index": 0, **changes})
    script_args = LlavaScriptArguments(hub_onto_existing=onto)
    found = claim_repository(args, script_args, LlavaModelConfig(), RECIPE, resuming=resuming)
    assert args.push_to_hub is False
    return found


# --- what is pushed when -------------------------------------------------------------------------------------------

ROOT = {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "trainer_state.json"}
WHOLE = {
    "manifest.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "trainer_state.json",
    "optimizer.pt",
    "rng_state.pth",
}


@pytest.mark.parametrize(
    ("strategy", "tags", "folders"),
    [
        ("every_save", ["checkpoint-1", "checkpoint-2"], []),
        ("checkpoint", ["checkpoint-1", "checkpoint-2"], ["last-checkpoint"]),
        ("all_checkpoints", ["checkpoint-1", "checkpoint-2"], ["checkpoint-1", "checkpoint-2"]),
    ],
)
def test_strategies(hub: hub_server.Hub, tmp_path: Path, strategy: str, tags: list[str], folders: list[str]) -> None:
    push = pushed(tmp_path / "run", strategy)
    finished(tmp_path / "run")
    url = push.end()
    repo = hub.repos["models", "tester/run"]
    assert url == f"{hub.url}/tester/run/commit/{repo.branches['main']}"
    assert sorted(repo.tags) == tags
    for tag in tags:
        files = hub.files("tester/run", tag)
        assert files["adapter_model.safetensors"].startswith(b"weights %s" % tag[-1].encode())
    inside = {f"{folder}/{name}" for folder in folders for name in WHOLE}
    assert set(hub.files("tester/run")) == ROOT | inside | {".gitattributes", "README.md"}
    if "last-checkpoint" in folders:
        assert hub.files("tester/run")["last-checkpoint/optimizer.pt"] == b"optimizer.pt 2"
    assert not (tmp_path / "run" / ".hub").exists()


def test_large_files_go_in_parts(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.part_size = 300
    push = pushed(tmp_path / "run", steps=(2,))
    weights = (finished(tmp_path / "run") / "adapter_model.safetensors").read_bytes()
    push.end()
    assert len(weights) == 900 and hub.files("tester/run")["adapter_model.safetensors"] == weights
    assert sum(method == "PUT" for method, _, _ in hub.requests) == 3


def test_a_branch_and_a_private_repository(hub: hub_server.Hub, tmp_path: Path) -> None:
    push = pushed(tmp_path / "run", steps=(2,), revision="tries", private=True)
    finished(tmp_path / "run")
    push.end()
    repo = hub.repos["models", "tester/run"]
    assert repo.private
    assert set(repo.at("main")[1]) == {".gitattributes"} and set(repo.at("tries")[1]) > ROOT
    assert set(repo.at("checkpoint-2")[1]) > ROOT


def test_a_checkpoint_that_is_deleted_meanwhile(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", status=503, times=2)
    push = pushed(tmp_path / "run", steps=(1,))
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    checkpoint(tmp_path / "run", 2)
    finished(tmp_path / "run")
    push.end()
    assert hub.files("tester/run", "checkpoint-1")["adapter_model.safetensors"] == b"weights 1" * 100


def test_of_those_that_wait_only_the_newest_is_pushed(
    hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_push, "FIRST_WAIT", 60)
    hub.fail("POST", "/commit/", status=503, times=1)
    push = pushed(tmp_path / "run", steps=(), keep_all=False)
    push.checkpoint(checkpoint(tmp_path / "run", 1), 1)
    while push.failure is None:
        time.sleep(0.01)
    with push._changed:  # before the thread wakes up
        for step in (2, 3):
            push.checkpoint(checkpoint(tmp_path / "run", step), step)
    assert push.settle(attempts=1) == []
    assert set(hub.repos["models", "tester/run"].tags) == {"checkpoint-1", "checkpoint-3"}
    assert not list((tmp_path / "run" / ".hub").iterdir())


def test_a_step_that_is_saved_again_moves_its_tag(hub: hub_server.Hub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    push = pushed(run, steps=(2,))
    finished(run)
    push.end()
    shutil.rmtree(run / "checkpoint-2")
    push = HubPush(repository(), run, HubStrategy.EVERY_SAVE, keep_all=True)
    folder = checkpoint(run, 2)
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    push.checkpoint(folder, 2)
    push.end()
    assert hub.files("tester/run", "checkpoint-2")["adapter_model.safetensors"] == b"other"


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        ({"method": "POST", "path": "/commit/", "status": 503}, []),
        ({"method": "POST", "path": "/commit/", "status": 429, "Retry_After": "7"}, []),
        ({"method": "POST", "path": "/commit/"}, []),
        ({"method": "PUT", "path": "/lfs/"}, [1]),
        ({"method": "POST", "path": "/preupload/", "status": 429, "Retry_After": "7"}, [8.0]),
        ({"method": "POST", "path": "/tag/", "status": 500}, []),
    ],
)
def test_one_fault_is_survived(hub: hub_server.Hub, tmp_path: Path, fault: dict[str, Any], waits: list[float]) -> None:
    hub.fail(**fault)
    push = pushed(tmp_path / "run")
    finished(tmp_path / "run")
    push.end()
    assert len(hub.went_wrong) == 1 and hub.waits == waits
    assert hub.files("tester/run", "checkpoint-1")["adapter_model.safetensors"] == b"weights 1" * 100
    assert hub.files("tester/run")["adapter_model.safetensors"] == b"weights 2" * 100


def test_failures_are_told_once(hub: hub_server.Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.fail("PUT", "/lfs/", times=12)  # the client tries 6 times
    push = pushed(tmp_path / "run", steps=(2,))
    while push.failure is None:
        time.sleep(0.01)
    finished(tmp_path / "run")
    push.end()
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 2
    assert messages[0].startswith("Pushing to tester/run failed (Server disconnected without sending a response.)")
    assert messages[0].endswith("It is tried again; training goes on.")
    assert messages[1] == "Pushing to tester/run works again."


def test_a_hub_that_stays_away_costs_nothing_but_the_push(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", status=503, times=100)
    push = pushed(tmp_path / "run", steps=(2,))
    finished(tmp_path / "run")
    with pytest.raises(PushError, match=r"the run is whole in .*run, but tester/run did not take it: .*503") as error:
        push.end()
    assert str(error.value).endswith(f"\n    trl-llava push {tmp_path / 'run'} --hub_model_id tester/run")
    assert not (tmp_path / "run" / ".hub").exists()


def test_a_token_that_is_revoked_while_training(hub: hub_server.Hub, tmp_path: Path) -> None:
    push = pushed(tmp_path / "run", steps=())
    push.repository.verify()
    hub.tokens.clear()
    push.checkpoint(checkpoint(tmp_path / "run", 2), 2)
    finished(tmp_path / "run")
    with pytest.raises(PushError, match="401"):
        push.end()


# --- what is found before training ---------------------------------------------------------------------------------


def test_nothing_is_asked_without_push_to_hub(hub: hub_server.Hub, tmp_path: Path) -> None:
    assert claim(tmp_path, push_to_hub=False) is None
    assert claim(tmp_path, process_index=1) is None
    assert not hub.requests


def test_a_good_token_makes_the_repository(hub: hub_server.Hub, tmp_path: Path) -> None:
    found = claim(tmp_path, hub_private_repo=True)
    assert found is not None and found.name == "tester/run" and found.verified
    assert hub.repos["models", "tester/run"].private
    assert claim(tmp_path, hub_model_id=None).name == "tester/out"


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, "run", r"needs a token with write access, and there is none: log in with `hf auth login`, or set HF_"),
        ("hf_wrong", "run", r"may not write to run \(.*401 .*log in"),
        (hub_server.READ_TOKEN, "run", r"may not write to run \(.*403 .*Use one with write access"),
        (hub_server.READ_TOKEN, "tester/there", r"may not write to tester/there \(.*403"),
        (
            hub_server.WRITE_TOKEN,
            "other/run",
            r"may not write to other/run .*set `hub_model_id` to a name of your own",
        ),
        (hub_server.WRITE_TOKEN, "a b", r"'a b' is no name for a repository"),
    ],
)
def test_wrong_tokens_and_names(
    hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, name: str, message: str
) -> None:
    hub.add("tester/there", {})
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message) as error:
        claim(tmp_path, hub_model_id=name)
    assert error.value.exit_status == 2 and (token is None or token not in str(error.value))
    assert list(hub.repos) == [("models", "tester/there")]


def test_offline(hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"the Hub cannot be reached .*HF_HUB_OFFLINE"):
        claim(tmp_path)


def test_a_hub_out_of_reach_stops_a_new_run_only(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.fail("POST", "/repos/create", status=503, times=2)
    with pytest.raises(HubError, match=r"the Hub cannot be reached \(.*503.*start without it"):
        claim(tmp_path)
    resumed = claim(tmp_path, resuming=True)
    assert resumed is not None and not resumed.verified
    hub.fail("POST", "/repos/create", times=1)
    with pytest.raises(HubError, match="the Hub cannot be reached"):
        claim(tmp_path)


def test_a_name_that_holds_something_else(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.add("tester/run", {"thesis.pdf": b"precious"})
    with pytest.raises(
        HubError, match=r"tester/run is there already and holds something else .*hub_onto_existing: true"
    ):
        claim(tmp_path)
    assert set(hub.files("tester/run")) == {".gitattributes", "thesis.pdf"}
    assert claim(tmp_path, onto=True) is not None


def test_a_name_that_holds_another_run(hub: hub_server.Hub, tmp_path: Path) -> None:
    there = Recipe({**RECIPE.given, "learning_rate": 0.2, "hub_strategy": "end", "output_dir": "elsewhere"}, {})
    hub.add("tester/run", {"recipe.yaml": there.to_yaml().encode(), "model.safetensors": b"x"})
    with pytest.raises(
        HubError, match=r"holds another run; its recipe.yaml differs in `dataset_name` .*; `learning_rate` \(0.2 there"
    ):
        claim(tmp_path)
    same = Recipe({**RECIPE.given, "dataset_name": "rows.json", "hub_strategy": "end", "output_dir": "else"}, {})
    hub.add("tester/run", {"recipe.yaml": same.to_yaml().encode(), "model.safetensors": b"x"})
    assert claim(tmp_path) is not None


def test_a_public_repository_for_a_private_run(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.add("tester/run", {})
    with pytest.raises(HubError, match="`hub_private_repo: true`, but tester/run is there already and public"):
        claim(tmp_path, hub_private_repo=True)


# --- what is never pushed ------------------------------------------------------------------------------------------


def test_no_paths_no_pickles_no_tokens(hub: hub_server.Hub, tmp_path: Path) -> None:
    push = pushed(tmp_path / "run", "checkpoint")
    finished(tmp_path / "run")
    push.end()
    for commit in hub.repos["models", "tester/run"].commits.values():
        assert not any(name.endswith("training_args.bin") for name in commit)
        everything = b"\n".join(content for name, content in commit.items() if not name.endswith(".safetensors"))
        for private in (str(tmp_path), "/home/me", "/scratch", "/models", hub_server.WRITE_TOKEN):
            assert private.encode() not in everything
    config = json.loads(hub.files("tester/run")["adapter_config.json"])
    assert config == {"base_model_name_or_path": "base", "r": 2}
    assert b"dataset_name: rows.json" in hub.files("tester/run")["recipe.yaml"]


def test_a_token_in_a_file_is_not_pushed(
    hub: hub_server.Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    (checkpoint(run, 2) / "config.json").write_text(json.dumps({"note": hub_server.WRITE_TOKEN}))
    args = SimpleNamespace(output_dir=str(run), hub_strategy="every_save", hub_always_push=False)
    trainer = SimpleNamespace(args=args, create_model_card=lambda: None)
    state: Any = SimpleNamespace(global_step=2)
    pushes = PushAtSaves(trainer, repository())
    pushes.on_save(trainer.args, state, None)  # training goes on
    message = r"config.json is not pushed: it holds what looks like a token .*hf_ww"
    assert re.search(message, caplog.text) and not hub.repos
    with pytest.raises(InputError, match=message):
        pushes.push.checkpoint(run / "checkpoint-2", 2)


def test_what_looks_like_a_path_in_a_vocabulary_stays(tmp_path: Path) -> None:
    run = checkpoint(tmp_path, 2)
    (run / "tokenizer.json").write_text('{"model": {"merges": [["/", "usr/lib"]], "token": "/usr/lib"}}')
    lay_out(run, tmp_path / "staged")
    assert (tmp_path / "staged" / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()


def test_what_was_pushed_can_be_downloaded(hub: hub_server.Hub, tmp_path: Path) -> None:
    push = pushed(tmp_path / "run", "checkpoint")
    finished(tmp_path / "run")
    push.end()
    there = Path(snapshot_download("tester/run", revision="checkpoint-1"))
    assert (there / "last-checkpoint" / "optimizer.pt").read_bytes() == b"optimizer.pt 1"


def test_a_pushed_checkpoint_is_one_to_go_on_from(hub: hub_server.Hub, tmp_path: Path) -> None:
    push = pushed(tmp_path / "run", "checkpoint")
    push.settle(attempts=1)
    check_manifest(Path(snapshot_download("tester/run")) / "last-checkpoint")
    finished(tmp_path / "run")
    push.end()
