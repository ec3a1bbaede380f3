"""`from trl_llava import ...`: the public names, imported when they are first used."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trl_llava

ROOT = Path(__file__).parents[1]


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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files in its tree, and takes what an earlier one has left
    for name in ("trl_llava", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", *build], check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_brings_recipes_and_launch_configurations(installed: Path) -> None:
    for name in ("recipes", "accelerate_configs"):
        expected = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*") if path.is_file()}
        found = {path.relative_to(installed / "trl_llava") for path in (installed / "trl_llava" / name).rglob("*.*")}
        assert {path for path in found if (installed / "trl_llava" / path).is_file()} == expected and expected


@pytest.mark.slow
def test_the_wheel_brings_what_pages_are_made_of(installed: Path) -> None:
    for kind in ("*.j2", "*.css"):
        expected = {path.relative_to(ROOT) for path in (ROOT / "trl_llava").rglob(kind)}
        assert {path.relative_to(installed) for path in installed.rglob(kind)} == expected and expected


@pytest.mark.slow
def test_an_installed_package_finds_its_recipes_from_anywhere(installed: Path, tmp_path: Path) -> None:
    code = """
import trl_llava, pathlib, sys
assert str(pathlib.Path(trl_llava.__file__)).startswith(sys.argv[1]), trl_llava.__file__
from trl_llava.configs.recipe import make_parser
from trl_llava.models.chat_templates import set_chat_template
from trl_llava.run.launch import find_accelerate_config
print(make_parser("ppo").check(["--config", "recipes/llava-1.5-7b-hf/ppo.yaml"]).values["output_dir"])
class Processor: tokenizer = None
set_chat_template(Processor, "recipes/llava-onevision-0.5b/chat_template.jinja")
for name in ("zero2", "accelerate_configs/zero2.yaml"):
    print(find_accelerate_config(name).read_text()[:1])
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, str(installed)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "runs/llava-1.5-7b-hf/ppo"
