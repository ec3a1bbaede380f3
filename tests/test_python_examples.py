"""What the docstrings of the public names show can be run."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from python_examples import ToyWorld, of_docstring

import trl_llava


@pytest.fixture(scope="module")
def toy_world(tmp_path_factory: pytest.TempPathFactory, tiny_llava_dir: Path) -> ToyWorld:
    return ToyWorld(tmp_path_factory.mktemp("toy_world"), tiny_llava_dir)


@pytest.mark.parametrize("name", trl_llava.__all__)
def test_docstring(name: str, toy_world: ToyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.image("red").save("red.png")
    public = getattr(trl_llava, name)
    examples = of_docstring(public.__doc__)
    assert examples
    toy_world.run(examples, {name: public})


def test_the_document(toy_world: ToyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT, reward, PPO and GRPO with the factual reward, each from what the one before has left."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        toy_world.run([(block, "")], names)
        assert names["trainer"].state.global_step >= 1
    assert (tmp_path / "ppo" / "adapter_model.safetensors").exists()
