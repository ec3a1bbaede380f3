"""SIGTERM and Ctrl-C to a launcher reach the processes it has started, which save and say how the run goes on."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_entry_points import Work

from trl_llava.manifest import check_manifest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "name"), [(1, "SIGTERM"), (2, "SIGTERM"), (2, "SIGINT")], ids=["one", "two", "two, Ctrl-C"]
)
def test_a_launched_run_saves_and_goes_on(tiny_llava_dir: Path, tmp_path: Path, processes: int, name: str) -> None:
    config = {"compute_environment": "LOCAL_MACHINE", "use_cpu": True, "num_machines": 1, "machine_rank": 0}
    config |= {"distributed_type": "MULTI_GPU" if processes > 1 else "NO", "num_processes": processes}
    config |= {"mixed_precision": "no", "main_process_port": 0}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(config))
    words = Work(tmp_path, tiny_llava_dir).words("sft", "run", "--model_name_or_path", str(tiny_llava_dir))
    words += ["--max_steps", "100000", "--use_peft", "--lora_r", "2"]
    launch = ["sft", "--accelerate_config", str(tmp_path / "launch.yaml"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    number = signal.Signals[name]

    def stop(command: list[str], ready: str) -> tuple[int, str]:
        with open(tmp_path / "log", "w") as log:
            run = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(600):
                if ready in (tmp_path / "log").read_text() or run.poll() is not None:
                    break
                time.sleep(0.1)
            run.send_signal(number)
            status = run.wait(timeout=60)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
        return status, (tmp_path / "log").read_text()

    status, said = stop([sys.executable, "-m", "trl_llava.cli", *launch], "'loss'")
    assert status == 128 + number, said[-3000:]
    assert f"{name}: finishing this step, then saving" in said and "Traceback" not in said
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    check_manifest(checkpoint)
    assert f"stopped by {name} after step {checkpoint.name.split('-')[1]} of 100000" in said
    command = shlex.split(said[said.index("Go on with:\n") :].splitlines()[1])
    assert command == ["trl-llava", *launch, "--resume_from_checkpoint"]
    status, said = stop([sys.executable, "-m", "trl_llava.cli", *command[1:]], "'loss'")
    assert status == 128 + number, said[-3000:]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
