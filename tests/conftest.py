"""Fixtures shared by the tests: tiny models in folders, their processors, drawn pictures. Nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from pathlib import Path

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
