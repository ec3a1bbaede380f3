"""Versions of what a run uses; none of the packages is imported for it."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import trl_llava

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed")


def versions() -> dict[str, str]:
    """Package -> installed version, and the commit of trl_llava where it is a git checkout."""
    found = {"python": platform.python_version(), "trl_llava": trl_llava.__version__}
    for package in PACKAGES:
        if (version := version_of(package)) is not None:  # some are optional
            found[package] = version
    root = Path(trl_llava.__file__).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
            found["trl_llava_commit"] = done.stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            found["trl_llava_commit"] = f"unknown ({type(error).__name__})"
    return found


def version_of(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
