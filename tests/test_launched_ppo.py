"""Two really launched processes train as one with the same global batch does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_trainers import favour_the_stop_token, make_adapter, ppo_trainer

TESTS = Path(__file__).parent
TIMED = ("time/", "tokens_per_second", "eps")


# accelerate's name for torchrun is MULTI_GPU; with use_cpu it runs on CPUs
DDP = {"distributed_type": "MULTI_GPU"}
ZERO2 = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}


def launch(
    folder: Path, backend: dict[str, Any], processes: int, script: str, *words: str
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` on CPU processes that talk through gloo."""
    config = {
        **backend,
        "compute_environment": "LOCAL_MACHINE",
        "use_cpu": True,
        "num_machines": 1,
        "num_processes": processes,
        "machine_rank": 0,
        "mixed_precision": "no",
        "main_process_port": 0,
    }
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, str(TESTS / script), *words], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(DDP, id="ddp"),
        pytest.param(ZERO2, id="zero2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_log_and_train_as_one(tiny_llava_dir: Path, tmp_path: Path, backend: dict[str, Any]) -> None:
    if backend is not DDP:
        pytest.importorskip("deepspeed", reason="needs the `deepspeed` extra")
    adapter = make_adapter(tiny_llava_dir, tmp_path / "adapter")
    settings = {"use_cpu": True, "total_episodes": 12, "num_ppo_epochs": 2, "correctness_coef": 1.0}
    two = tmp_path / "two"
    two.mkdir()
    changes = {**settings, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    words = (str(tiny_llava_dir), str(adapter), str(two), json.dumps(changes))
    finished = launch(tmp_path, backend, 2, "launched_ppo.py", *words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    record = json.loads((two / "record.json").read_text())
    assert record["processes"] == 2

    whole = {**settings, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path / "one", **whole)
    favour_the_stop_token(trainer.policy_model)
    trainer.train()
    assert len(record["log"]) == len(trainer.state.log_history) == 3
    for expected, actual in zip(trainer.state.log_history, record["log"], strict=True):
        for name, value in expected.items():
            if not name.startswith(TIMED):
                assert actual[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    for name, total in record["sums"].items():
        assert weights[name].double().sum().item() == pytest.approx(total, rel=1e-4, abs=1e-4), name
