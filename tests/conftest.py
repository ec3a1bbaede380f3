"""Fixtures shared by the tests: tiny models in folders, their processors, drawn pictures. Nothing is downloaded."""

import os

import hub_server

# Before anything imports huggingface_hub. The loopback Hub answers nothing before a test starts it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_ENDPOINT"] = hub_server.shared().url
os.environ["HF_HUB_DISABLE_XET"] = "1"

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()


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
    """A folder with a random LLaVA-OneVision; its processor is `tiny_models.onevision_processor()`. Read only."""
    return tiny_models.tiny_llava_onevision(tmp_path_factory.mktemp("tiny_llava_onevision"))


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random text-only Llama and its tokenizer. Read only."""
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


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


@contextmanager
def hub_client(hub: hub_server.Hub, cache: Path) -> Iterator[hub_server.Hub]:
    """Let this process talk to an empty Hub, logged in, with an empty cache; the client's waits take no time."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, are_progress_bars_disabled, enable_progress_bars

    bars, level = are_progress_bars_disabled(), logging.getLogger("huggingface_hub").level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", hub_server.WRITE_TOKEN)
        patch.setattr(_http, "time", SimpleNamespace(sleep=hub.clear().waits.append))
        yield hub
    logging.getLogger("huggingface_hub").setLevel(level)
    if not bars:
        enable_progress_bars()
    for thread in threading.enumerate():
        if thread.name == "hub-push":
            thread.join(5)


@pytest.fixture
def hub(served_hub: hub_server.Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub_server.Hub]:
    """An empty Hub that this process is logged in to."""
    with hub_client(served_hub, tmp_path_factory.mktemp("hub_cache")) as hub:
        yield hub
