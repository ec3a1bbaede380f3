"""Nothing from elsewhere is unpickled or run, and no token of ours is written down."""

import ast
import json
import logging
import shutil
from pathlib import Path

import hub_server
import pytest
import tiny_trainers
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from trl_llava import cli
from trl_llava.configs.recipe import make_parser
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError
from trl_llava.models.adapters import load_adapter
from trl_llava.models.load import load_policy
from trl_llava.models.starts import load_score_model
from trl_llava.run import output_dir

PACKAGE = Path(cli.__file__).parent


class Evil:
    """A pickle that would tell that it was loaded."""

    def __reduce__(self) -> tuple:
        return print, ("PICKLE LOADED",)


@pytest.fixture
def pickled_adapter(tiny_llava_dir: Path, tmp_path: Path) -> Path:
    folder = tiny_trainers.make_adapter(tiny_llava_dir, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_an_adapter_that_is_a_pickle(
    hub: hub_server.Hub, tiny_policy: PreTrainedModel, tiny_llava_dir: Path, pickled_adapter: Path, where: str
) -> None:
    name = str(pickled_adapter)
    if where == "hub":
        hub.add("org/lora", pickled_adapter)
        name = "org/lora"
    message = rf"adapter '{name}' has its weights as a pickle only .*: `trl-llava convert {name} DST --base BASE`"
    with pytest.raises(InputError, match=message):
        load_adapter(tiny_policy, name, is_trainable=False)
    with pytest.raises(InputError, match=message):
        load_score_model(name, LlavaModelConfig(), base=str(tiny_llava_dir))
    assert not any(path.endswith(".bin") for method, path, _ in hub.requests if method == "GET")


def test_the_command_in_that_message_works(
    tiny_policy: PreTrainedModel, tiny_llava_dir: Path, pickled_adapter: Path, tmp_path: Path
) -> None:
    target = tmp_path / "converted"
    config = json.loads((pickled_adapter / "adapter_config.json").read_text())
    before = torch.load(pickled_adapter / "adapter_model.bin", weights_only=True)
    assert cli.main(["convert", str(pickled_adapter), str(target), "--base", str(tiny_llava_dir)]) == 0
    after = load_file(target / "adapter_model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    assert json.loads((target / "adapter_config.json").read_text())["r"] == config["r"]
    load_adapter(tiny_policy, str(target), is_trainable=False)


def test_a_pickle_that_would_run_code_is_not_converted(
    pickled_adapter: Path, tiny_llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Evil(), pickled_adapter / "adapter_model.bin")
    words = [str(pickled_adapter), str(tmp_path / "converted"), "--base", str(tiny_llava_dir)]
    assert cli.main(["convert", *words]) == 1
    told = capsys.readouterr()
    assert "a pickle may run code" in told.err and "PICKLE LOADED" not in told.out
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_model_that_is_a_pickle(hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llava_dir, folder)
    (folder / "model.safetensors").unlink()
    torch.save(Evil(), folder / "pytorch_model.bin")
    name = str(folder)
    if where == "hub":
        hub.add("org/model", folder)
        name = "org/model"
    with pytest.raises(InputError, match=rf"model_name_or_path '{name}' has its weights as a pickle only .*convert"):
        load_policy(LlavaModelConfig(model_name_or_path=name))
    assert not any(path.endswith(".bin") for method, path, _ in hub.requests if method == "GET")


def test_every_torch_load_takes_weights_only() -> None:
    found = 0
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "dill.loads"), path
            if called == "torch.load":
                found += 1
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", f"{path}:{node.lineno}"
    assert found >= 1


def test_remote_code_is_only_run_where_it_is_asked_for() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) != "True", f"{path}:{node.value.lineno}"


def test_a_token_in_a_recipe_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    (tmp_path / "mine.yaml").write_text(f"hub_token: {hub_server.WRITE_TOKEN}\nuse_cpu: true\nbf16: false\n")
    words = ["--config", str(tmp_path / "mine.yaml"), "--output_dir", str(tmp_path / "run")]
    with caplog.at_level(logging.DEBUG):
        _, args, *_, recipe = make_parser("sft").parse(words)
        output_dir.claim(args, recipe)
        output_dir.record(args, recipe)
    assert hub_server.WRITE_TOKEN not in recipe.to_yaml() + caplog.text + str(args) + args.to_json_string()
    for path in (tmp_path / "run").iterdir():
        assert hub_server.WRITE_TOKEN not in path.read_text()
