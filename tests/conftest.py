"""Fixtures shared by the tests: tiny models in folders, their processors, drawn pictures. Nothing is downloaded."""

import os
import sys
from pathlib import Path

# Before anything imports transformers, which imports torchvision; and for all processes that tests start.
sys.path.insert(0, str(Path(__file__).parent / "child_site"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH", "")]))
import cpu_torchvision  # noqa: F401
import devices
import hub_server

os.environ.update(devices.hidden(sys.argv[1:]))  # before anything looks for devices

# Before anything imports huggingface_hub. The loopback Hub answers nothing before a test starts it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_ENDPOINT"] = hub_server.shared().url
os.environ["HF_HUB_DISABLE_XET"] = "1"

import functools
import importlib.util
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import stage_runs
import tiny_models
import torch
from hub_login import hub_client
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()


def stop_without(*packages: str) -> None:
    """Say what is missing, instead of what an import of it says in the middle of transformers."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.fail(f"the processor of this model needs {' and '.join(missing)}: `make install`", pytrace=False)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Take back what a test sets in `os.environ`: TRL's colocated vLLM leaves a RANK there, which later tests obey."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def tiny_llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA-1.5 (CLIP + Llama, 16 image tokens) and its processor. Read only."""
    return tiny_models.tiny_llava(tmp_path_factory.mktemp("tiny_llava"))


@pytest.fixture(scope="session")
def tiny_llava_next_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA-NeXT and its processor. Read only."""
    return tiny_models.tiny_llava_next(tmp_path_factory.mktemp("tiny_llava_next"))


@pytest.fixture(scope="session")
def tiny_llava_onevision_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA-OneVision and its processor. Read only."""
    stop_without("torchvision")
    return tiny_models.tiny_llava_onevision(tmp_path_factory.mktemp("tiny_llava_onevision"))


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random text-only Llama and its tokenizer. Read only."""
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family of `tiny_families.FAMILIES`, by its name. Read only."""
    stop_without("torchvision", "num2words")
    import tiny_families  # not above: some of these classes cannot even be imported without torchvision

    @functools.cache
    def folder(name: str) -> Path:
        return tiny_families.FAMILIES[name](tmp_path_factory.mktemp(name))

    return folder


@pytest.fixture(scope="session")
def one_process(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `stage_runs.run_as_one`: what runs of several processes start from and are compared with."""
    folder = tmp_path_factory.mktemp("stages")
    stage_runs.run_as_one(folder, tiny_llava_dir)
    return folder


@pytest.fixture
def tiny_processor(tiny_llava_dir: Path) -> ProcessorMixin:
    """A fresh processor of `tiny_llava_dir`."""
    return AutoProcessor.from_pretrained(tiny_llava_dir)


@pytest.fixture
def tiny_policy(tiny_llava_dir: Path) -> PreTrainedModel:
    """A fresh LLaVA of `tiny_llava_dir` in fp32, eval mode."""
    return AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)


@pytest.fixture
def red_image() -> Image.Image:
    """Red, 40 wide and 32 high, with a white square in the top left corner."""
    return tiny_models.image("red")


@pytest.fixture
def blue_image() -> Image.Image:
    """Blue, 30 wide and 60 high, with a white square in the top left corner."""
    return tiny_models.image("blue", (30, 60))


@pytest.fixture(scope="session")
def served_hub() -> Iterator[hub_server.Hub]:
    """The loopback Hub, answering."""
    with hub_server.shared() as hub:
        yield hub


@pytest.fixture
def hub(served_hub: hub_server.Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub_server.Hub]:
    """An empty Hub that this process is logged in to."""
    with hub_client(served_hub, tmp_path_factory.mktemp("hub_cache")) as hub:
        yield hub
