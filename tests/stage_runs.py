"""Runs of the three stages on tiny models for one process or several that share the same global batch."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import pytest
import tiny_models
import yaml

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "accelerate_configs"
STAGES = ("sft", "reward", "ppo")
# Measured times, and what TRL and transformers count anew after a restart.
NOT_COMPARED = ("time/", "tokens_per_second", "eps", "runtime", "per_second", "flos")
NOT_RESUMED = (*NOT_COMPARED, "num_tokens", "train_loss")
# With two processes of one row each: a picture on both, on the second alone, on the first alone, on none.
PICTURED = (True, True, False, True, True, False, False, False)
WORDS = ("a square", "a dog", "red", "a blue circle and a green triangle", "Yes", "No", "a white square", "it is A")
# accelerate's name for torchrun is MULTI_GPU; with use_cpu it runs on CPUs
BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "zero3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True},
    },
    "fsdp2": {
        key: value
        for key, value in yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text()).items()
        if key in ("distributed_type", "fsdp_config")
    },
}
COMMON = [
    *("--use_cpu", "--disable_tqdm", "--bf16", "false", "--report_to", "none", "--logging_steps", "1"),
    *("--learning_rate", "0.01", "--save_strategy", "steps", "--save_steps", "1"),
    *("--gradient_checkpointing", "true", "--gradient_accumulation_steps", "2"),
]


def write_rows(folder: Path) -> None:
    """Rows of each stage, of mixed length, with and without pictures."""
    rows = []
    for i, pictured in enumerate(PICTURED):
        if pictured:
            tiny_models.image(("red", "blue", "green")[i % 3]).save(folder / f"{i}.png")
        question = [{"role": "user", "content": f"what is it{' now' * (i % 3)}?"}]
        rows.append({"images": [f"{i}.png"] if pictured else [], "prompt": question, "captions": [f"caption {i}"]})
    said = [[{"role": "assistant", "content": words}] for words in WORDS]
    stages = {
        "sft": [{**row, "completion": answer} for row, answer in zip(rows, said, strict=True)],
        "reward": [{**row, "chosen": a, "rejected": b} for row, a, b in zip(rows, said, said[::-1], strict=True)],
        "ppo": rows,
    }
    for name, table in stages.items():
        (folder / f"{name}.json").write_text(json.dumps(table))


def run_as_one(folder: Path, base: Path) -> None:
    """Rows, an adapter and a reward model that PPO starts from, in `start/`, and each stage's run in `one/`.

    Args:
        folder: where to.
        base: the base model.
    """
    write_rows(folder)
    for stage in ("sft", "reward"):
        run(stage, run_words(folder, base, folder / "start", stage, 1, "--max_steps", "1"))
    for stage in STAGES:
        run(stage, run_words(folder, base, folder / "one", stage, 1))
    own = ["--num_mini_batches", "1", "--learning_rate", "0.001"]
    run("ppo", run_words(folder, base, folder / "one_mini_batch", "ppo", 1, *own))
    run("ppo", whole_model_words(folder, base, folder / "one_whole_model", 1))


def run(stage: str, words: list[str]) -> None:
    """Run a stage in this process."""
    importlib.import_module(f"trl_llava.train_{stage}").main(words)


def log_of(run: Path) -> list[dict[str, Any]]:
    """What a run has logged."""
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def assert_same_logs(actual: Path, expected: Path, without: tuple[str, ...], tolerance: float = 1e-5) -> None:
    """Hold every logged number of a run to that of another, but for names that contain one of `without`."""
    assert len(log_of(actual)) == len(log_of(expected))
    for entry, wanted in zip(log_of(actual), log_of(expected), strict=True):
        for name, value in wanted.items():
            if not any(part in name for part in without):
                assert entry[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, wanted.get("step"))


def run_words(folder: Path, base: Path, out: Path, stage: str, processes: int, *more: str) -> list[str]:
    """The words of one run of a stage, whose global batch is four rows.

    Args:
        folder: where `write_rows` wrote.
        base: the base model.
        out: parent of the run's `output_dir`.
        stage: sft, reward or ppo.
        processes: how many there are.
        more: further words.
    """
    words = [*COMMON, "--dataset_name", f"{folder}/{stage}.json", "--output_dir", f"{out}/{stage}"]
    words += ["--per_device_train_batch_size", str(2 // processes)]
    if stage == "ppo":
        words += ["--sft_model_path", f"{folder}/start/sft", "--reward_model_path", f"{folder}/start/reward"]
        words += ["--total_episodes", "12", "--num_ppo_epochs", "2", "--num_mini_batches", "2"]
        words += ["--response_length", "6", "--stop_token", "eos", "--num_sample_generations", "0"]
        words += ["--correctness_coef", "1", "--length_coef", "-1"]
        # Answers of different lengths then need the head a different number of times on each process.
        words += ["--logits_chunk_size", str(6 // processes - 1)]
    else:
        words += ["--model_name_or_path", str(base), "--use_peft", "--lora_r", "2", "--lora_dropout", "0"]
        words += ["--max_steps", "3"]
        words += ["--per_device_eval_batch_size", "2", "--eval_strategy", "steps", "--eval_steps", "1"]
        words += ["--test_split_size", "2"]
    if stage == "reward":
        # Without centring nothing but rounding moves the bias of the head, and Adam makes whole steps of it.
        words += ["--reward_centering", "paper", "--center_rewards_coefficient", "0.1"]
    if stage == "sft":
        words += ["--freeze_projector", "false"]
    return [*words, *more]


def whole_model_words(folder: Path, base: Path, out: Path, processes: int) -> list[str]:
    """The words of a PPO run whose policy is a whole model, compared with a frozen copy of it; as for `run_words`."""
    words = run_words(folder, base, out, "ppo", processes, "--save_strategy", "no", "--learning_rate", "0.001")
    place = words.index("--sft_model_path")
    return [*words[:place], "--model_name_or_path", str(base), *words[place + 2 :]]


def write_config(folder: Path, backend: dict[str, Any], processes: int, **config: Any) -> Path:
    """Write a launch configuration for CPU processes.

    Args:
        folder: where it goes.
        backend: one of `BACKENDS`.
        processes: how many there are, on all machines.
        config: changes of the configuration; its keys are the launcher's, and None leaves one out.
    """
    settings = {
        **backend,
        "compute_environment": "LOCAL_MACHINE",
        "use_cpu": True,
        "num_machines": 1,
        "num_processes": processes,
        "machine_rank": 0,
        "mixed_precision": "no",
        "main_process_port": 0,
        **config,
    }
    file = folder / f"accelerate_{settings['machine_rank']}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return file


def start(
    folder: Path,
    backend: dict[str, Any],
    processes: int,
    script: str,
    *words: str,
    environment: Mapping[str, str] = MappingProxyType({}),
    **config: Any,
) -> subprocess.Popen[str]:
    """Start `accelerate launch` on CPU processes that talk through gloo.

    Args:
        folder: where its configuration goes.
        backend: one of `BACKENDS`.
        processes: how many there are, on all machines.
        script: a file of this folder.
        words: its command line.
        environment: further variables.
        config: changes of the configuration; its keys are the launcher's.
    """
    file = write_config(folder, backend, processes, **config)
    command = ["-m", "accelerate.commands.launch", "--config_file", str(file), str(TESTS / script), *words]
    return start_python(folder, command, **environment)


def start_python(
    folder: Path, command: list[str], output: IO[str] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start Python, in a process group of its own, with what launched runs need in the environment.

    Args:
        folder: where the run may leave what it leaves outside of its `output_dir`.
        command: Python's command line.
        output: where stdout and stderr go, instead of a pipe each.
        environment: further variables.
    """
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, *command],
        env=variables,
        text=True,
        stdout=output or subprocess.PIPE,
        stderr=output or subprocess.PIPE,
        start_new_session=True,
    )


def end_of(process: subprocess.Popen[str], since: str) -> tuple[int, str, str, float]:
    """Wait for a process, and measure how long it takes to end once it has said something.

    Args:
        process: one of `start`.
        since: the first line on stderr with this text starts the clock.

    Returns:
        Exit status, what it wrote to stdout and to stderr, and the seconds.
    """
    assert process.stdout is not None and process.stderr is not None
    printed, lines, said = [], [], math.nan
    reader = threading.Thread(target=lambda pipe: printed.append(pipe.read()), args=[process.stdout], daemon=True)
    alarm = threading.Timer(300, os.killpg, [process.pid, signal.SIGKILL])
    for thread in (reader, alarm):
        thread.start()
    for line in process.stderr:
        lines.append(line)
        if since in line and math.isnan(said):
            said = time.monotonic()
    status = process.wait()
    alarm.cancel()
    reader.join(5)
    return status, "".join(printed), "".join(lines), time.monotonic() - said


def launch(*args: Any, **config: Any) -> tuple[int, str]:
    """`start`, to its end.

    Returns:
        Exit status, and what it wrote to stderr.
    """
    process = start(*args, **config)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, errors
