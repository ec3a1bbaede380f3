"""The paper's adapters and heads to PEFT adapters of today's models."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForSequenceClassification

import trl_llava.models.sequence_classification  # noqa: F401  registers the score-head models
from trl_llava.errors import InputError
from trl_llava.models.load import HEAD
from trl_llava.tools.convert.layouts import adapter_shard, read_shard

_OLD = "base_model.model.model.layers."
_NEW = "base_model.model.model.language_model.layers."


def convert_adapter(
    folder: Path,
    output: Path,
    *,
    base: str,
    base_source: str,
    base_revision: str | None = None,
    head: Path | None = None,
) -> None:
    """Write a LoRA adapter, with the score head of the file `head` if there is one.

    `base` is what adapter_config.json names as its base, `base_source` where the base's config.json is read from to
    check the shapes.
    """
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check_settings(folder, settings)
    tensors = {}
    for name, tensor in read_shard(adapter_shard(folder)):
        if not name.startswith((_OLD, _NEW)) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise InputError(f"{folder} has the weight {name}; expected LoRA weights below {_OLD} or {_NEW}")
        tensors[_NEW + name.removeprefix(_OLD).removeprefix(_NEW)] = tensor.contiguous()
    layers = sorted({name.split(".")[-3] for name in tensors})
    if head is not None:
        tensors.update(_head(head))
    config = LoraConfig(
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        base_model_name_or_path=base,
        revision=base_revision,
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout", 0.0),
        target_modules=rf"(?:.*\.)?language_model\..*\.({'|'.join(layers)})",
        modules_to_save=None if head is None else [HEAD],
        inference_mode=True,
    )
    _check_fit(folder, tensors, config, base_source, base_revision)
    config.save_pretrained(str(output))
    save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})


def check_no_other_weights(folder: Path) -> None:
    """Refuse an adapter whose non_lora_trainables.bin holds weights that an adapter cannot carry."""
    file = folder / "non_lora_trainables.bin"
    names = [name for name, _ in read_shard(file)] if file.is_file() else []
    if names:
        raise InputError(
            f"{file} holds {len(names)} weights that were trained beside the adapter (first {names[0]}); on the plain "
            "base the adapter would compute something else. Merge it with its original code, then convert the model"
        )


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise for an adapter whose weights do not mean what plain LoRA weights mean."""
    plain: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "fan_in_fan_out": (False, None),
        "modules_to_save": (None, []),
        "use_rslora": (False, None),
        "use_dora": (False, None),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
    }
    for name, expected in plain.items():
        if settings.get(name, expected[0] if name != "peft_type" else None) not in expected:
            raise InputError(
                f"{folder / 'adapter_config.json'} has {name}={settings.get(name)!r}; only plain LoRA adapters can be "
                f"converted (expected {expected[0]!r})"
            )


def _head(file: Path) -> dict[str, torch.Tensor]:
    tensors = dict(read_shard(file))
    if sorted(tensors) != ["bias", "weight"] or tensors["bias"].shape != (1,) or len(tensors["weight"]) != 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise InputError(f"{file} holds {shapes}; expected `weight` [1, H] and `bias` [1]")
    return {f"base_model.model.{HEAD}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def _check_fit(
    folder: Path, tensors: dict[str, torch.Tensor], config: LoraConfig, base: str, revision: str | None
) -> None:
    """Compare names and shapes with those of such an adapter on the base, built without weights."""
    model_config = AutoConfig.from_pretrained(base, revision=revision)
    kind: Literal["CAUSAL_LM", "SEQ_CLS"] = config.task_type
    automodel = AutoModelForImageTextToText if kind == "CAUSAL_LM" else AutoModelForSequenceClassification
    if kind == "SEQ_CLS":
        model_config.num_labels = 1
    with torch.device("meta"):
        # PEFT writes the model's name into the configuration it is given.
        model = get_peft_model(automodel.from_config(model_config), deepcopy(config), low_cpu_mem_usage=True)
        expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise InputError(
            f"the adapter {folder} does not fit the base '{base}': {name} is {found.get(name, 'missing')} in the "
            f"adapter, but {expected.get(name, 'no layer')} fits the base. Name the base that it was trained on"
        )
