"""Rooms open one way: each uses only those below it, so that a run can be read from top to bottom.

Read with `ast`, also inside functions; nothing is executed.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_llava"
FLOORS = (
    ("cli",),
    ("demo",),
    ("tools",),
    ("train_sft", "train_reward", "train_ppo", "train_grpo", "train_rloo", "train_dpo"),
    ("online_rl",),
    ("stage_run", "sft_trainer", "reward_trainer", "ppo_trainer"),
    ("ppo", "card_samples"),
    ("rewards",),
    ("data", "publish"),
    ("models", "run"),
    ("configs",),
    ("health", "prompts", "hub"),
    ("errors",),
)
"""Top-level modules and folders, from the top; those on one floor do not know each other."""
FLOOR = {room: depth for depth, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions and by `import_module`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {entry.value for entry in node.args[:1] if isinstance(entry, ast.Constant)}
    return names


def rooms_used(path: Path) -> set[str]:
    parts = (name.split(".") for name in imported(path))
    return {part[1] for part in parts if part[0] == "trl_llava" and len(part) > 1 and part[1] in FLOOR}


def test_every_room_has_its_floor() -> None:
    assert {room_of(path) for path in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = room_of(path)
    for used in rooms_used(path) - {own}:
        assert FLOOR[used] > FLOOR[own], f"{own} uses {used}"


def test_no_module_stands_in_a_circle() -> None:
    dotted = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    graph = {
        name: {known for used in imported(path) for known in (used, used.rpartition(".")[0]) if known in dotted}
        for name, path in dotted.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "grpo", "rloo", "dpo"])
def test_every_stage_is_there_without_trls_ppo(stage: str) -> None:
    code = f"import sys; sys.modules['trl.experimental.ppo'] = None; import trl_llava.train_{stage}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
