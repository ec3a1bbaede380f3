"""README.md tells the truth: its tree is the repository's, its commands parse, its code fits our signatures."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

from trl_llava import cli
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.tools.plan import command as plan

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def commands(page: str = "README.md") -> list[list[str]]:
    joined = "\n".join(blocks("bash", page)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines() if line.strip()]
    return [words[next((i for i, word in enumerate(words) if "=" not in word), 0) :] for words in lines if words]


PAGES = ("README.md", *(f"docs/{page.name}" for page in DOCS))
OURS = [
    pytest.param(words[1:], id=f"{page.removeprefix('docs/')} {' '.join(words[1:])}")
    for page in PAGES
    for words in commands(page)
    if words[0].rpartition("/")[2] == "trl-llava"
]


def test_contributing_shows_every_room() -> None:
    (tree,) = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines() if not line.startswith(" ")}
    paths = [path for path in (ROOT / "trl_llava").iterdir() if not path.is_symlink()]  # recipes/ and the like
    rooms = {path.name for path in paths if path.is_dir() or path.suffix == ".py"}
    assert shown == rooms - {"__init__.py", "__pycache__", "card_samples.py"}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *PAGES])
def test_every_file_named_in_the_text_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:trl_llava|recipes|tests|benchmarks|accelerate_configs|docs)/[\w./-]+\.\w+)`", text))
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


@pytest.mark.parametrize("words", OURS)
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # What `init` writes for a reader's own photos has the keys of a recipe that is here.
    words = [word.replace("photos/recipes/", "recipes/llava-1.5-7b-hf/") for word in words]
    ran = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", ran.append)
    if words[0] in cli.STAGES:
        assert cli.main(words) == 0
        assert len(ran) == 1
    elif words[0] == "plan":  # parsed as the command does, but its model is not here
        plan.read_job(*plan.make_parser().parse_known_args(words[1:]))
    else:
        importlib.import_module(cli.TOOLS[words[0]][0]).make_parser().parse_args(words[1:])


def test_python_example_uses_what_there_is() -> None:
    (code,) = blocks("python")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = __import__(node.module, fromlist=[alias.name for alias in node.names])
            assert all(hasattr(module, alias.name) for alias in node.names)
    inspect.signature(FactualReward.from_pretrained).bind("runs/reward")


def test_demo_results_have_their_place() -> None:
    assert README.count("<!-- demo-results") == 1
