"""A run that is asked to stop: its last checkpoint is pushed, or the user is told how to push it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_server
import pytest
import test_hub_push
from test_hub_push import checkpoint, finished
from test_hub_runs import PUSH, QUICK, write_rows

from trl_llava import cli
from trl_llava.publish import push as hub_push
from trl_llava.publish import trainer as hub_trainer
from trl_llava.publish.push import HubPush
from trl_llava.publish.trainer import PushAtSaves


@pytest.fixture
def pushed() -> Iterator[Callable[..., HubPush]]:
    """Pushes some checkpoints; their threads end with the test."""
    made: list[HubPush] = []

    def push(*args: Any, **changes: Any) -> HubPush:
        made.append(test_hub_push.pushed(*args, **changes))
        return made[-1]

    yield push
    for one in made:
        one._upload = lambda job: None  # type: ignore[method-assign]
        one.finish()


def stop(push: HubPush, asked_to_stop: bool = True, end_follows: bool = True) -> None:
    elsewhere = push.output_dir.parent / "elsewhere"  # where a new `HubPush` clears up
    args = SimpleNamespace(output_dir=elsewhere, hub_strategy=push.strategy, hub_always_push=push.keep_all)
    pushes = PushAtSaves(SimpleNamespace(args=args, asked_to_stop=asked_to_stop), push.repository, None, end_follows)
    pushes.push = push
    nothing: Any = None
    pushes.on_train_end(nothing, nothing, nothing)


def test_the_last_checkpoint_is_pushed(
    hub: hub_server.Hub, pushed: Callable[..., HubPush], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop(pushed(tmp_path / "run"))
    assert set(hub.repos["models", "tester/run"].tags) == {"checkpoint-1", "checkpoint-2"}
    assert capsys.readouterr().out in ("", (
        "checkpoint-2 is saved; pushing it to tester/run for up to 60 seconds. If that is cut short, push it with:\n"
        f"    trl-llava push {tmp_path / 'run'} --hub_model_id tester/run\nPushed to tester/run.\n"
    ))  # fmt: skip


def test_a_push_that_waits_for_its_next_attempt_is_tried_at_once(
    hub: hub_server.Hub, pushed: Callable[..., HubPush], tmp_path: Path
) -> None:
    hub.fail("POST", "/commit/", status=503, times=1)
    push = pushed(tmp_path / "run", steps=(1,))  # and then it would wait for 10 seconds
    while push.failure is None:
        time.sleep(0.01)
    start = time.monotonic()
    stop(push)
    assert set(hub.repos["models", "tester/run"].tags) == {"checkpoint-1"} and time.monotonic() - start < 5


def test_a_hub_that_is_away_is_tried_again_and_the_command_told(
    hub: hub_server.Hub,
    pushed: Callable[..., HubPush],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_push, "FIRST_WAIT", 0.1)
    hub.fail("POST", "/commit/", status=503, times=100)
    push = pushed(tmp_path / "run")
    while push.failure is None:
        time.sleep(0.01)
    attempts, start = len(hub.went_wrong), time.monotonic()
    stop(push)
    assert len(hub.went_wrong) > attempts and time.monotonic() - start < 10
    told = capsys.readouterr().out.splitlines()
    assert told[1] == f"    trl-llava push {tmp_path / 'run'} --hub_model_id tester/run"
    assert told[2].startswith("Not pushed to tester/run: checkpoint-1, checkpoint-2 (") and "503" in told[2]


def test_an_attempt_that_was_under_way_is_not_the_last(
    hub: hub_server.Hub, pushed: Callable[..., HubPush], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_push, "FIRST_WAIT", 0.1)
    push = pushed(tmp_path / "run", steps=())
    begun = []

    def upload(job: hub_push.Job) -> None:
        begun.append(job.folder.name)
        if len(begun) == 1:
            time.sleep(0.3)
            raise ConnectionError("away")

    push._upload = upload  # type: ignore[method-assign]
    push.checkpoint(checkpoint(tmp_path / "run", 1), 1)
    while not begun:
        time.sleep(0.01)
    stop(push)
    assert push.waiting == [] and begun == ["checkpoint-1", "checkpoint-1"]


def test_the_time_is_bounded(
    hub: hub_server.Hub, pushed: Callable[..., HubPush], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_trainer, "SETTLING", 0.1)
    push = pushed(tmp_path / "run", steps=())
    push._upload = lambda job: time.sleep(1)  # type: ignore[method-assign]
    push.checkpoint(checkpoint(tmp_path / "run", 1), 1)
    start = time.monotonic()
    stop(push)
    assert time.monotonic() - start < 0.8 and push.waiting == ["checkpoint-1"]


def test_a_second_ctrl_c_ends_the_waiting(
    hub: hub_server.Hub,
    pushed: Callable[..., HubPush],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: Any, **options: Any) -> list[str]:
        raise KeyboardInterrupt

    push = pushed(tmp_path / "run", steps=())
    push._upload = lambda job: time.sleep(0.5)  # type: ignore[method-assign]
    push.checkpoint(checkpoint(tmp_path / "run", 1), 1)
    monkeypatch.setattr(push, "settle", interrupted)
    stop(push)
    assert capsys.readouterr().out.splitlines()[-1] == "Not pushed to tester/run: checkpoint-1."


def test_a_run_that_ends_leaves_it_to_its_end(
    hub: hub_server.Hub, pushed: Callable[..., HubPush], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = pushed(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(push, "settle", lambda *args, **options: pytest.fail("waited"))
        stop(push, asked_to_stop=False)
    finished(tmp_path / "run")
    push.end()


@pytest.mark.slow
def test_sigterm_to_a_run_whose_hub_goes_away(hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path: Path) -> None:
    """The whole command: it saves, tries, and tells both commands; the one for the push works."""
    folder = write_rows(tmp_path)
    words = ["--model_name_or_path", str(tiny_llava_dir), "--use_peft", "--lora_r", "2", "--max_steps", "1000000"]
    words += ["--dataset_name", f"{folder}/sft.json", "--output_dir", f"{folder}/run", "--hub_model_id", "tiny"]
    words += ["--save_steps", "20", "--save_total_limit", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "trl_llava.train_sft", *QUICK, *PUSH, *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        hub.fail("POST", "/commit/", status=503, times=10**6)
        while not hub.went_wrong:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert "is saved; pushing it to tester/tiny for up to 60 seconds" in out and "Not pushed to tester/tiny" in out
    assert "all is saved in" in out and "--resume_from_checkpoint" in out
    hub.faults.clear()
    told = next(line.split() for line in out.splitlines() if line.startswith("    trl-llava push"))
    assert cli.main(told[1:]) == 0
    last = max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert last.name in hub.repos["models", "tester/tiny"].tags
    content = (last / "adapter_model.safetensors").read_bytes()
    assert hub.files("tester/tiny", last.name)["adapter_model.safetensors"] == content
