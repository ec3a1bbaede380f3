"""`trl-llava env`: versions, cards and settings of this machine, as a bug report needs them.

Nothing but torch is imported, and where torch cannot be, that is what it says.
"""

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from trl_llava.run.versions import version_of, versions

OPTIONAL = ("torchvision", "vllm", "liger-kernel", "flash-attn", "kernels", "lmms-eval", "wandb", "tensorboard")
VARIABLES = (
    *("CUDA_", "NCCL_", "TORCH", "PYTORCH_", "OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_RANK", "RANK", "MASTER_"),
    *("HF_", "TRANSFORMERS_", "ACCELERATE_", "DS_", "VLLM_", "WANDB_", "LD_LIBRARY_PATH", "TOKENIZERS_"),
)
"""Beginnings of the names of environment variables that change a run."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints it; `argv` is the command line without the program's name."""
    argparse.ArgumentParser(prog="trl-llava env", description="What a bug report needs.").parse_args(argv)
    for line in report():
        print(line)


def report() -> Iterator[str]:
    """The lines."""
    found = versions()
    yield f"platform: {platform.platform()}, {os.cpu_count()} CPUs, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    yield from (f"{name}: {version}" for name, version in found.items())
    yield from (f"{name}: {version}" for name in OPTIONAL if (version := version_of(name)) is not None)
    yield from _torch()
    yield from _driver()
    yield f"accelerate's own configuration: {_accelerate_config() or 'none'}"
    for name in sorted(os.environ):
        if name.startswith(VARIABLES):
            yield f"{name}={'(set)' if any(word in name for word in SECRET) else os.environ[name]}"


def _torch() -> Iterator[str]:
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises is what the report is for
        yield f"torch cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    build = f"for ROCm {torch.version.hip}" if torch.version.hip else build
    yield f"torch is built {build}, and sees {torch.cuda.device_count()} cards"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"  card {index}: {card.name}, {card.total_memory / 2**30:.1f} GiB, compute {card.major}.{card.minor}"


def _driver() -> Iterator[str]:
    """What the driver sees, which torch may not."""
    if (program := shutil.which("nvidia-smi")) is None:
        yield "nvidia-smi: not there"
        return
    command = [program, "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        yield f"nvidia-smi: {type(error).__name__}"
        return
    yield from (f"nvidia-smi: {line}" for line in (done.stdout or done.stderr).strip().splitlines())


def _accelerate_config() -> str | None:
    """The file that `accelerate launch` reads where no configuration is named."""
    home = os.environ.get("HF_HOME", os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface")
    path = Path(home).expanduser() / "accelerate" / "default_config.yaml"
    return str(path) if path.is_file() else None
