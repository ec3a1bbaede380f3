"""SIGTERM and Ctrl-C to a launcher reach the processes it has started, which save and say how to resume."""

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from stage_runs import BACKENDS, NOT_RESUMED, assert_same_logs, end_of, run_words, start_python, write_config

from trl_llava.run.manifest import check_manifest

pytestmark = pytest.mark.xdist_group("launched")


def test_ppo_on_two_processes_finishes_its_step_saves_and_resumes(
    one_process: Path, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    """SIGTERM comes in the second of three steps, to the launcher, both processes and their data loaders' workers."""
    config = str(write_config(tmp_path, BACKENDS["ddp"], 2))
    own = ["--reward_funcs", "launched_stages:waiting_to_be_stopped", "--dataloader_num_workers", "1"]
    words = run_words(one_process, tiny_llava_dir, tmp_path, "ppo", 2, *own)
    launch = ["ppo", "--accelerate_config", config, *words]
    marker = tmp_path / "marker"

    def run(words: list[str]) -> tuple[int, str, str, float]:
        process = start_python(tmp_path, ["-m", "trl_llava.cli", *words], ASK_TO_STOP=str(marker))
        sender = threading.Thread(target=signal_all, args=[process, marker])
        sender.start()
        end = end_of(process, since="finishing this step")
        sender.join()
        return end

    status, printed, errors, seconds = run(launch)
    assert status == 128 + signal.SIGTERM, errors[-3000:]
    assert "SIGTERM: finishing this step, then saving" in errors and "Traceback" not in errors
    assert seconds < 60
    assert "stopped by SIGTERM after step 2 of 3" in printed
    check_manifest(tmp_path / "ppo" / "checkpoint-2")
    command = shlex.split(printed[printed.index("Resume with:\n") :].splitlines()[1])
    assert command == ["trl-llava", *launch, "--resume_from_checkpoint"]
    marker.write_text("sent")
    status, _, errors, _ = run(command[1:])
    assert status == 0, errors[-3000:]
    assert_same_logs(tmp_path / "ppo", one_process / "one" / "ppo", NOT_RESUMED)


def signal_all(run: subprocess.Popen[str], marker: Path) -> None:
    """Send SIGTERM to every process of a run once it has marker for it."""
    while run.poll() is None:
        if marker.exists() and marker.read_text() == "now":
            launcher = psutil.Process(run.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                process.send_signal(signal.SIGTERM)
            marker.write_text("sent")
            return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "name", "workers"),
    [(1, "SIGTERM", 0), (2, "SIGTERM", 0), (2, "SIGINT", 0), (2, "SIGTERM", 1), (2, "SIGINT", 1)],
)
def test_a_launched_run_saves_and_resumes(
    one_process: Path, tiny_llava_dir: Path, tmp_path: Path, processes: int, name: str, workers: int
) -> None:
    """The signal goes to the launcher alone, or, where there are workers of data loaders, to every process."""
    backend = BACKENDS["ddp"] if processes > 1 else {"distributed_type": "NO"}
    config = str(write_config(tmp_path, backend, processes))
    own = ["--max_steps", "100000", "--save_strategy", "no", "--eval_strategy", "no"]
    own += ["--dataloader_num_workers", str(workers)]
    words = run_words(one_process, tiny_llava_dir, tmp_path, "sft", processes, *own)
    launch = ["sft", "--accelerate_config", config, *words]
    number = signal.Signals[name]

    def tell(run: subprocess.Popen[str]) -> None:
        launcher = psutil.Process(run.pid)
        for process in [*(launcher.children(recursive=True) if workers else []), launcher]:
            process.send_signal(number)

    status, said = stop(tmp_path, ["-m", "trl_llava.cli", *launch], tell)
    assert status == 128 + number, said[-3000:]
    assert f"{name}: finishing this step, then saving" in said and "Traceback" not in said, said[-3000:]
    (checkpoint,) = (tmp_path / "sft").glob("checkpoint-*")
    check_manifest(checkpoint)
    assert f"stopped by {name} after step {checkpoint.name.split('-')[1]} of 100000" in said
    command = shlex.split(said[said.index("Resume with:\n") :].splitlines()[1])
    assert command == ["trl-llava", *launch, "--resume_from_checkpoint"]
    status, said = stop(tmp_path, ["-m", "trl_llava.cli", *command[1:]], tell)
    assert status == 128 + number, said[-3000:]
    assert len(list((tmp_path / "sft").glob("checkpoint-*"))) == 2


def stop(folder: Path, command: list[str], tell: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
    """Start a run that logs each step, and tell it to stop after the first."""
    with open(folder / "log", "w") as log:
        run = start_python(folder, command, output=log)
    try:
        for _ in range(900):
            if "'loss'" in (folder / "log").read_text() or run.poll() is not None:
                break
            time.sleep(0.1)
        tell(run)
        status = run.wait(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    return status, (folder / "log").read_text()
