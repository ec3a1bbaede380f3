"""Really launched processes train as one with the same global batch does: all stages, saved and resumed too."""

import importlib
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from stage_runs import BACKENDS, launch, run_words, start, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

# One worker of pytest-xdist makes the runs that these tests compare.
pytestmark = pytest.mark.xdist_group("launched")
CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
STAGES = ("sft", "reward", "ppo")
# Measured times, and what TRL and transformers count anew after a restart.
NOT_COMPARED = ("time/", "tokens_per_second", "eps", "runtime", "per_second", "flos")
NOT_RESUMED = (*NOT_COMPARED, "num_tokens", "train_loss")


@pytest.fixture(scope="module")
def work(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, an adapter and a reward model to start PPO from, and the runs of one process, in `one/`."""
    folder = tmp_path_factory.mktemp("stages")
    write_rows(folder)
    for stage in ("sft", "reward"):
        run(stage, run_words(folder, tiny_llava_dir, folder / "start", stage, 1, "--max_steps", "1"))
    for stage in STAGES:
        run(stage, run_words(folder, tiny_llava_dir, folder / "one", stage, 1))
    return folder


def run(stage: str, words: list[str]) -> None:
    importlib.import_module(f"trl_llava.train_{stage}").main(words)


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3"])
def two(request: pytest.FixtureRequest, work: Path, tiny_llava_dir: Path) -> Path:
    """The same runs on two processes, and again in `resumed/` from their second checkpoint."""
    out = work / request.param
    out.mkdir()
    plan = [(stage, run_words(work, tiny_llava_dir, out, stage, 2)) for stage in STAGES]
    for stage in STAGES:
        resume = ["--resume_from_checkpoint", f"{out}/{stage}/checkpoint-2"]
        plan.append((stage, run_words(work, tiny_llava_dir, out / "resumed", stage, 2, *resume)))
    if request.param == "ddp":
        for stage in STAGES:
            resume = ["--resume_from_checkpoint", f"{work}/one/{stage}/checkpoint-2"]
            plan.append((stage, run_words(work, tiny_llava_dir, out / "joined", stage, 2, *resume)))
    (out / "plan.json").write_text(json.dumps(plan))
    status, errors = launch(out, BACKENDS[request.param], 2, "launched_stages.py", str(out / "plan.json"))
    assert status == 0, errors[-5000:]
    assert not (out / "compiled").exists()  # or every new machine would wait for it
    return out


def log_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def assert_same_logs(actual: Path, expected: Path, without: tuple[str, ...]) -> None:
    assert len(log_of(actual)) == len(log_of(expected))
    for entry, wanted in zip(log_of(actual), log_of(expected), strict=True):
        for name, value in wanted.items():
            if not any(part in name for part in without):
                assert entry[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, wanted.get("step"))


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_log_and_train_as_one(work: Path, two: Path, stage: str) -> None:
    assert_same_logs(two / stage, work / "one" / stage, NOT_COMPARED)
    parts = ["adapter_model.safetensors"] + ["value_model/adapter_model.safetensors"] * (stage == "ppo")
    for part in parts:
        expected, actual = (load_file(folder / stage / part) for folder in (work / "one", two))
        assert expected.keys() == actual.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(actual[name], weight, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_resume_as_if_never_stopped(two: Path, stage: str) -> None:
    assert_same_logs(two / "resumed" / stage, two / stage, NOT_RESUMED)
    expected, actual = (load_file(folder / stage / "adapter_model.safetensors") for folder in (two, two / "resumed"))
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_go_on_from_a_checkpoint_of_one(work: Path, two: Path, stage: str) -> None:
    if two.name == "ddp":
        assert_same_logs(two / "joined" / stage, work / "one" / stage, NOT_RESUMED)


def test_a_process_that_fails_ends_the_run_in_seconds_and_says_why_first(
    work: Path, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    own = [
        "--value_init",
        "policy",
        "--reward_funcs",
        "launched_stages:failing_on_the_second",
        "--save_strategy",
        "no",
    ]
    words = run_words(work, tiny_llava_dir, tmp_path, "ppo", 2, *own)
    (tmp_path / "plan.json").write_text(json.dumps([("ppo", words)]))
    status, errors = launch(tmp_path, BACKENDS["ddp"], 2, "launched_stages.py", str(tmp_path / "plan.json"))
    seconds = time.time() - float((tmp_path / "failed_at").read_text())
    assert status == 1 and seconds < 20
    said = errors.index("error (process 1 of 2): rows.json[3]: its picture is gone")
    assert "Traceback" not in errors[:said]
    assert "rank      : 1" in errors[errors.index("Root Cause") :]


def test_two_machines_train_as_one_process(work: Path, tiny_llava_dir: Path, tmp_path: Path) -> None:
    words = run_words(work, tiny_llava_dir, tmp_path, "ppo", 2, "--save_strategy", "no")
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
    assert_same_logs(tmp_path / "ppo", work / "one" / "ppo", NOT_COMPARED)


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


def test_fsdp2_configuration_makes_accelerates_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2", "script.py"])
    args, _, _ = _validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    plugin.set_auto_wrap_policy(tiny_model := LlamaForCausalLM(LlamaConfig(**tiny_models.text_config(64))))
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(tiny_model.model.layers[0])}
