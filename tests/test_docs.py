"""The documents build into a site without a broken link, with every key of every stage; their commands are real."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_llava.configs.recipe import STAGES, make_parser

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (site / name).is_file(), page.name


def test_every_key_of_every_stage_is_on_the_page_of_recipes(site: Path) -> None:
    text = (site / "recipes" / "index.html").read_text()
    missing = {
        name for stage in STAGES for name in make_parser(stage).field_names if f"<code>{name}</code>" not in text
    }
    assert missing == set()


def test_the_reference_has_what_users_call(site: Path) -> None:
    text = (site / "api" / "index.html").read_text()
    for name in ("LlavaSFTTrainer", "LlavaPPOTrainer", "FactualReward.from_pretrained", "load_rows", "ppo_math.gae"):
        assert f'{name}"' in text, name


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "docs" / "demo.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(cells))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "cells.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    before, after = re.findall(r"mentioned, but not in the picture: ([\d.]+)% -> ([\d.]+)%", done.stdout)[0]
    assert float(after) < float(before)
