"""Fixtures of the parity tests: the processor that a converted checkpoint has, with each of the two tokenizers."""

from pathlib import Path

import golden_data
import pytest
from transformers import ProcessorMixin

from trl_llava.models.load import load_processor


@pytest.fixture(scope="session", params=golden_data.VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """`legacy` or `nonlegacy`: the flag of the original's tokenizer_config.json."""
    return request.param


@pytest.fixture(scope="session")
def processor(variant: str, tmp_path_factory: pytest.TempPathFactory) -> ProcessorMixin:
    """The processor of the converted model. Read only."""
    folder: Path = golden_data.convert_base(tmp_path_factory.mktemp(variant), variant)
    return load_processor(str(folder))
