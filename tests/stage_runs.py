"""Runs of the three stages on tiny models for one process or several that share the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_models
import yaml

TESTS = Path(__file__).parent
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


def start(
    folder: Path, backend: dict[str, Any], processes: int, script: str, *words: str, **config: Any
) -> subprocess.Popen[str]:
    """Start `accelerate launch` on CPU processes that talk through gloo.

    Args:
        folder: where its configuration goes.
        backend: one of `BACKENDS`.
        processes: how many there are, on all machines.
        script: a file of this folder.
        words: its command line.
        config: changes of the configuration; its keys are the launcher's.
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
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
        "FAILED_AT": str(folder / "failed_at"),
    }
    return subprocess.Popen(
        [*command, str(TESTS / script), *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


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
