"""Really launched processes train as one with the same global batch does: all stages, saved and resumed too."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stage_runs import (
    BACKENDS,
    CONFIGS,
    NOT_COMPARED,
    NOT_RESUMED,
    STAGES,
    assert_same_logs,
    end_of,
    launch,
    run_words,
    start,
    whole_model_words,
)

# One worker of pytest-xdist makes the runs that these tests compare.
pytestmark = pytest.mark.xdist_group("launched")


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3"])
def two(request: pytest.FixtureRequest, one_process: Path, tiny_llava_dir: Path) -> Path:
    """The same runs on two processes, and again in `resumed/` from their second checkpoint.

    In `killed/`, PPO is killed while it writes its last checkpoint, and goes on from the one before.
    """
    out = one_process / request.param
    out.mkdir()

    def words(folder: str, stage: str, *more: str) -> list[str]:
        return run_words(one_process, tiny_llava_dir, out / folder, stage, 2, *more)

    def launched(*plan: tuple) -> tuple[int, str]:
        (out / "plan.json").write_text(json.dumps(plan))
        return launch(out, BACKENDS[request.param], 2, "launched_stages.py", str(out / "plan.json"))

    tokens = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--num_mini_batches", "1"]
    tokens += ["--learning_rate", "0.001", "--max_tokens_per_micro_batch", "33"]
    whole = [(stage, words("", stage)) for stage in STAGES] + [("ppo", words("tokens", "ppo", *tokens))]
    if request.param == "zero3":
        whole.append(("ppo", whole_model_words(one_process, tiny_llava_dir, out / "whole_model", 2)))
    status, errors = launched(*whole, ("ppo", words("killed", "ppo"), ("killed_at", 3)))
    assert status == 1 and "SIGKILL" in errors, errors[-5000:]
    assert sorted(path.name for path in (out / "killed" / "ppo").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert (out / "killed" / "ppo" / "_checkpoint-3.unfinished").is_dir()
    plan = [("ppo", words("killed", "ppo", "--resume_from_checkpoint"))]
    for stage in STAGES:
        plan.append((stage, words("resumed", stage, "--resume_from_checkpoint", f"{out}/{stage}/checkpoint-2")))
        if request.param == "ddp":
            joined = ["--resume_from_checkpoint", f"{one_process}/one/{stage}/checkpoint-2"]
            plan.append((stage, words("joined", stage, *joined)))
    status, errors = launched(*plan)
    assert status == 0, errors[-5000:]
    assert not (out / "compiled").exists()  # or every new machine would wait for it
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_log_and_train_as_one(one_process: Path, two: Path, stage: str) -> None:
    assert_same_logs(two / stage, one_process / "one" / stage, NOT_COMPARED)
    parts = ["adapter_model.safetensors"] + ["value_model/adapter_model.safetensors"] * (stage == "ppo")
    for part in parts:
        expected, actual = (load_file(folder / stage / part) for folder in (one_process / "one", two))
        assert expected.keys() == actual.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(actual[name], weight, rtol=1e-4, atol=1e-4, msg=name)


def test_token_budgets_that_split_each_process_otherwise_change_nothing(one_process: Path, two: Path) -> None:
    assert_same_logs(two / "tokens" / "ppo", one_process / "one_mini_batch" / "ppo", NOT_COMPARED)


@pytest.mark.parametrize(("again", "stage"), [*(("resumed", stage) for stage in STAGES), ("killed", "ppo")])
def test_two_processes_resume_as_if_never_stopped(two: Path, again: str, stage: str) -> None:
    assert_same_logs(two / again / stage, two / stage, NOT_RESUMED, tolerance=0)
    expected, actual = (load_file(folder / stage / "adapter_model.safetensors") for folder in (two, two / again))
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


def test_a_reference_with_weights_of_its_own_sees_on_every_process(one_process: Path, two: Path) -> None:
    """Under ZeRO-3 it is shared out too, so that none may look alone."""
    if two.name == "zero3":
        assert_same_logs(two / "whole_model" / "ppo", one_process / "one_whole_model" / "ppo", NOT_COMPARED)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_go_on_from_a_checkpoint_of_one(one_process: Path, two: Path, stage: str) -> None:
    if two.name == "ddp":
        assert_same_logs(two / "joined" / stage, one_process / "one" / stage, NOT_RESUMED)


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_fails_ends_the_run_in_seconds_and_says_why_first(
    one_process: Path, tiny_llava_dir: Path, tmp_path: Path, stage: str
) -> None:
    words = run_words(one_process, tiny_llava_dir, tmp_path, stage, 2, "--save_strategy", "no")
    (tmp_path / "plan.json").write_text(json.dumps([(stage, words, ("fails_on", 1))]))
    process = start(tmp_path, BACKENDS["ddp"], 2, "launched_stages.py", str(tmp_path / "plan.json"))
    status, _, errors, seconds = end_of(process, since="error (process")
    assert status == 1 and seconds < 20, errors[-5000:]
    said = errors.index("error (process 1 of 2): rows.json[3]: its picture is gone")
    assert "Traceback" not in errors[:said]
    assert "rank      : 1" in errors[errors.index("Root Cause") :]


def test_two_machines_train_as_one_process(one_process: Path, tiny_llava_dir: Path, tmp_path: Path) -> None:
    words = run_words(one_process, tiny_llava_dir, tmp_path, "ppo", 2, "--save_strategy", "no")
    (tmp_path / "plan.json").write_text(json.dumps([("ppo", words)]))
    multi_node = yaml.safe_load((CONFIGS / "multi_node.yaml").read_text())
    machines = {"num_machines": 2, "main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    script = ("launched_stages.py", str(tmp_path / "plan.json"))
    nodes = [start(tmp_path, multi_node, 2, *script, **machines, machine_rank=rank) for rank in (0, 1)]
    try:
        errors = [node.communicate(timeout=200)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    assert_same_logs(tmp_path / "ppo", one_process / "one" / "ppo", NOT_COMPARED)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_slurm_script_starts_one_launcher_on_each_machine(tmp_path: Path) -> None:
    stubs = {"scontrol": "echo first; echo second", "accelerate": 'echo "$@"'}
    stubs["srun"] = 'shift; SLURM_NODEID=1 exec "$@"'
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    words = [str(CONFIGS / "slurm.sh"), "ppo", "--config", "ppo.yaml", "--run_name", "two words"]
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=30).stdout
    expected = (
        "launch --config_file accelerate_configs/multi_node.yaml --num_machines 2 --num_processes 8 --machine_rank 1 "
        "--main_process_ip first --main_process_port 20007 "
        "-m trl_llava.train_ppo --config ppo.yaml --run_name two words"
    )
    assert printed == f"{expected}\n"
