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
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def tree() -> dict[str, str]:
    """Path -> phrase of the annotated tree; a folder's files stand indented below it."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in blocks("text")[0].splitlines():
        name, _, phrase = line.strip().partition(" ")
        indent = len(line) - len(line.lstrip())
        above = [(depth, folder) for depth, folder in above if depth < indent]
        path = "".join(folder for _, folder in above) + name
        found[path] = phrase.strip()
        if name.endswith("/"):
            above.append((indent, name))
    return found


def commands() -> list[list[str]]:
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.strip()]


def test_every_path_of_the_tree_exists_with_a_phrase() -> None:
    for path, phrase in tree().items():
        assert (ROOT / path).exists(), path
        assert phrase or path == "trl_llava/", path


def test_every_module_is_in_the_tree() -> None:
    package = ROOT / "trl_llava"
    modules = {path for path in package.rglob("*.py") if path.name != "__init__.py" and "demo" not in path.parts}
    assert {str(path.relative_to(ROOT)) for path in modules} - set(tree()) == set()


def test_every_file_named_in_the_text_exists() -> None:
    named = set(re.findall(r"`((?:trl_llava|recipes|tests|accelerate_configs)/[\w./-]+)`", README))
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


@pytest.mark.parametrize("words", [words for words in commands() if words[:1] == ["trl-llava"]], ids=" ".join)
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ran = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", ran.append)
    if words[1] == "plan":  # parsed as the command does, but its model is not here
        ran.append(plan.read_job(*plan._make_parser().parse_known_args(words[2:])))
        return
    if words[1] in ("push", "score", "convert", "merge"):
        importlib.import_module(cli.TOOLS[words[1]][0]).make_parser().parse_args(words[2:])
        return
    assert cli.main(words[1:]) == 0
    assert len(ran) == 1


def test_python_example_uses_what_there_is() -> None:
    (code,) = blocks("python")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = __import__(node.module, fromlist=[alias.name for alias in node.names])
            assert all(hasattr(module, alias.name) for alias in node.names)
    inspect.signature(FactualReward.from_pretrained).bind("runs/reward")


def test_demo_results_have_their_place() -> None:
    assert README.count("<!-- demo-results") == 1
