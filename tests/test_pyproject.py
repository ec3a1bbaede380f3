"""What the package imports is what pyproject.toml names, once and with bounds, and what constraints.txt pins."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]


def imported() -> set[str]:
    """Top-level names of everything the package imports from elsewhere."""
    names = set()
    for path in (ROOT / "trl_llava").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - {"trl_llava"}


def test_every_import_is_a_dependency() -> None:
    owners = importlib.metadata.packages_distributions()
    named = {canonicalize_name(item.name) for item in [*NEEDED, *(one for many in EXTRAS.values() for one in many)]}
    asked_for = {"wandb"}  # by `report_to`
    missing = {
        name
        for name in imported() - asked_for
        if not {canonicalize_name(owner) for owner in owners.get(name, [name])} & named
    }
    assert not missing


@pytest.mark.parametrize("group", ["", *EXTRAS])
def test_each_dependency_is_named_once_and_bounded_below(group: str) -> None:
    items = EXTRAS[group] if group else NEEDED
    names = [canonicalize_name(item.name) for item in items]
    assert len(names) == len(set(names))
    assert all(any(part.operator in (">=", "==") for part in item.specifier) for item in items)


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_the_pins_are_within_the_bounds(file: str) -> None:
    lines = (ROOT / file).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [pin for pin in pins.values() if "+" in pin]  # local builds such as +cpu
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    # `eval` has an environment of its own: lmms-eval's pins do not go with these.
    for item in [*NEEDED, *(one for group, many in EXTRAS.items() for one in many if group != "eval")]:
        name = canonicalize_name(item.name)
        assert pinned[name] in item.specifier, item


def test_messages_name_extras_that_exist() -> None:
    text = "".join(path.read_text() for path in [*(ROOT / "trl_llava").rglob("*.py"), ROOT / "README.md"])
    assert {name for names in re.findall(r"trl-llava\[([\w,]+)\]", text) for name in names.split(",")} <= set(EXTRAS)


def test_make_installs_what_the_default_tests_launch() -> None:
    installed = re.findall(r"--editable \"\.\[([\w,]+)\]\"", (ROOT / "Makefile").read_text())
    assert any({"dev", "qlora", "deepspeed", "vlm"} <= set(extras.split(",")) for extras in installed)
