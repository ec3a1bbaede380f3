"""FSDP2 as accelerate_configs/fsdp2.yaml asks for it, in two CPU processes: SFT and reward model train as one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from stage_runs import BACKENDS, CONFIGS, NOT_COMPARED, NOT_RESUMED, assert_same_logs, launch, run_words
from transformers import AutoModelForImageTextToText

from trl_llava.errors import InputError
from trl_llava.models.sharded_weights import layer_names, shard_by_layers

pytestmark = pytest.mark.xdist_group("launched")


@pytest.fixture(scope="module")
def sharded(one_process: Path, tiny_llava_dir: Path) -> Path:
    """The runs of two processes, and again in `resumed/` from their second checkpoint."""
    out = one_process / "fsdp2"
    out.mkdir()
    # Checkpointing would have all embeddings ask for gradients, with pictures or without.
    own = {"sft": ["--gradient_checkpointing", "false"], "reward": []}
    plan = [(stage, run_words(one_process, tiny_llava_dir, out, stage, 2, *own[stage])) for stage in own]
    for stage in own:
        resume = [*own[stage], "--resume_from_checkpoint", f"{out}/{stage}/checkpoint-2"]
        plan.append((stage, run_words(one_process, tiny_llava_dir, out / "resumed", stage, 2, *resume)))
    (out / "plan.json").write_text(json.dumps(plan))
    status, errors = launch(out, BACKENDS["fsdp2"], 2, "launched_stages.py", str(out / "plan.json"))
    assert status == 0, errors[-5000:]
    return out


@pytest.mark.slow  # in one of its runs glibc found the heap of a process corrupted, in FSDP on CPUs
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_train_as_one(one_process: Path, sharded: Path, stage: str) -> None:
    assert_same_logs(sharded / stage, one_process / "one" / stage, NOT_COMPARED)
    name = "adapter_model.safetensors"
    expected, actual = (load_file(folder / stage / name) for folder in (one_process / "one", sharded))
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow  # in one of its runs glibc found the heap of a process corrupted, in FSDP on CPUs
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_resume_as_if_never_stopped(sharded: Path, stage: str) -> None:
    assert_same_logs(sharded / "resumed" / stage, sharded / stage, NOT_RESUMED)
    name = "adapter_model.safetensors"
    expected, actual = (load_file(folder / stage / name) for folder in (sharded, sharded / "resumed"))
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("tiny_llava_dir", ["CLIPEncoderLayer", "CLIPVisionEmbeddings", "LlamaDecoderLayer"]),
        ("tiny_llava_next_dir", ["CLIPEncoderLayer", "CLIPVisionEmbeddings", "LlamaDecoderLayer"]),
        ("tiny_llava_onevision_dir", ["Qwen2DecoderLayer", "SiglipEncoderLayer", "SiglipVisionEmbeddings"]),
    ],
)
def test_each_family_is_shared_out_by_its_own_layers(
    family: str, names: list[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration's policy finds every layer of language model and tower, through PEFT too."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2", "script.py"])
    args, _, _ = _validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    model = AutoModelForImageTextToText.from_pretrained(request.getfixturevalue(family))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    plugin.transformer_cls_names_to_wrap = layer_names(model)
    assert plugin.transformer_cls_names_to_wrap == names
    plugin.set_auto_wrap_policy(model)
    units = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {unit.__name__ for unit in units} == set(names)
    language_model, tower = model.model.model.language_model, model.model.model.vision_tower
    layers = [*language_model.layers, *tower.encoder.layers]
    assert layers and all(type(layer) in units for layer in layers)


def test_trained_weights_that_one_process_alone_has_loaded_are_refused(tiny_llava_dir: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir).requires_grad_(False).to("meta")
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), process_index=1)
    shard_by_layers(model, accelerator)
    assert plugin.transformer_cls_names_to_wrap == layer_names(model)
    model.lm_head.requires_grad_(True)
    with pytest.raises(InputError, match=r"process 1 has 1 trained weights without values \(first lm_head.weight\)"):
        shard_by_layers(model, accelerator)
