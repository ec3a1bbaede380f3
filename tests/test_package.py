"""`from trl_llava import ...`: the public names, imported when they are first used."""

import subprocess
import sys

import pytest

import trl_llava


@pytest.mark.parametrize("name", trl_llava.__all__)
def test_a_public_name_is_the_class_of_that_name(name: str) -> None:
    assert getattr(trl_llava, name).__name__ == name
    assert name in dir(trl_llava)


def test_the_package_itself_imports_no_library_of_models() -> None:
    code = "import sys, trl_llava; print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(ImportError, match="cannot import name 'LlavaTrainer'"):
        from trl_llava import LlavaTrainer  # type: ignore[attr-defined]  # noqa: F401
