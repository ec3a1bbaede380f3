"""A policy's weights as those of one dense model, one tensor after the other; the policy itself is left as it is.

An adapter is added to its layer's weights on the way out, in a tensor of its own. PEFT's merging would do it in place,
and each way there and back would leave a base that other roles compute with slightly different.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from trl_llava.errors import InputError
from trl_llava.hub.lookup import find_file
from trl_llava.models.base_model import base_of

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[None]]
"""Makes parameters whole, where they are spread over processes, inside a `with` block."""


class Part(NamedTuple):
    """One tensor of the dense model.

    Attributes:
        name: in the checkpoint.
        module: what holds it.
        attribute: its name there.
        layer: the LoRA layer whose matrices are added to it, if any.
    """

    name: str
    module: nn.Module
    attribute: str
    layer: LoraLayer | None


class DenseWeights:
    """Every parameter of a policy as it computes, dense, by the name that it has in the base's checkpoint.

    Whatever can load that checkpoint can take these.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel) -> None:
        """List what there is; nothing is computed.

        Args:
            policy: a model, or a PEFT model of which the active adapter counts.

        Raises:
            InputError: if the adapter is more than LoRA matrices and modules trained whole, or the names in the
                checkpoint cannot be told from those in the model.
        """
        self.adapter = str(policy.active_adapter) if isinstance(policy, PeftModel) else None
        base = base_of(policy)
        self.dtype = base.dtype
        parts: dict[int, Part] = {}
        for part in self._parts("", base):
            known = parts.setdefault(id(getattr(part.module, part.attribute)), part)
            if known is not part and (known.layer or part.layer):
                raise _cannot(part.name, f"LoRA on weights that are tied to `{known.name}`")
        names = _checkpoint_names(base, [part.name for part in parts.values()])
        self.parts = [part._replace(name=names[part.name]) for part in parts.values()]

    @torch.no_grad()
    def tensors(self, gather: Gather | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Make one tensor after the other; where weights are gathered, every process takes them all.

        Args:
            gather: makes a tensor's parameters whole while it is made.

        Yields:
            Name and tensor: the parameter's own where nothing had to be done, else a new one in the base's dtype.
        """
        for part in self.parts:
            with nullcontext() if gather is None else gather(self._parameters(part)):
                tensor = self._tensor(part)
                if gather is not None and part.layer is None:
                    tensor = tensor.clone()  # the parameter is spread out again at the end of the block
            yield part.name, tensor

    def _parts(self, name: str, module: nn.Module) -> Iterator[Part]:
        """The tensors of a module and of those in it, as the active adapter has them."""
        if isinstance(module, LoraLayer):
            has_lora = self._has_lora(name, module)
            base = module.get_base_layer()
            for attribute, _ in base.named_parameters(recurse=False):
                layer = module if has_lora and attribute == "weight" else None
                yield Part(f"{name}.{attribute}", base, attribute, layer)
        elif isinstance(module, ModulesToSaveWrapper):
            own = self.adapter in module.modules_to_save
            yield from self._parts(name, module.modules_to_save[self.adapter] if own else module.original_module)
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise _cannot(name, type(module).__name__)
        else:
            prefix = f"{name}." if name else ""
            for attribute, _ in module.named_parameters(recurse=False):
                yield Part(f"{prefix}{attribute}", module, attribute, None)
            for child_name, child in module.named_children():
                yield from self._parts(f"{prefix}{child_name}", child)

    def _has_lora(self, name: str, layer: LoraLayer) -> bool:
        """Whether the active adapter is in this layer, as two matrices and nothing else."""
        if layer.merged_adapters:
            raise ValueError(f"adapter {layer.merged_adapters} is merged into {name}; call model.unmerge_adapter()")
        if self.adapter not in layer.scaling:
            return False
        if self.adapter in layer.lora_variant:
            raise _cannot(name, type(layer.lora_variant[self.adapter]).__name__)
        if layer.lora_bias.get(self.adapter):
            raise _cannot(name, "`lora_bias`")
        return True

    def _parameters(self, part: Part) -> list[nn.Parameter]:
        matrices = (
            []
            if part.layer is None
            else [value for name, value in part.layer.named_parameters() if str(self.adapter) in name.split(".")]
        )
        return [getattr(part.module, part.attribute), *matrices]

    def _tensor(self, part: Part) -> torch.Tensor:
        stored = getattr(part.module, part.attribute)
        dense = dequantize_module_weight(part.module) if part.attribute == "weight" else stored
        if dense is not stored:
            dense = dense.to(self.dtype)
        if part.layer is None:
            return dense.detach()
        delta = part.layer.get_delta_weight(self.adapter)
        return (dense.float() + delta.float()).to(dense.dtype)


def _checkpoint_names(base: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """What the model's parameters are called in the checkpoint it was loaded from."""
    stand_ins = {name: torch.empty(0) for name in names}
    found = {id(value): name for name, value in revert_weight_conversion(base, dict(stand_ins)).items()}
    missing = [name for name, value in stand_ins.items() if id(value) not in found]
    if missing:
        raise InputError(
            f"the weights of {type(base).__name__} cannot be handed over one by one: `{missing[0]}` has no place of "
            "its own in its checkpoint"
        )
    known = {name: found[id(value)] for name, value in stand_ins.items()}
    # A model that was loaded under ZeRO-3 does not know what was renamed: the file itself tells.
    stored = {_place(name): name for name in _stored_names(base)}
    return {name: stored.get(_place(name), guess) for name, guess in known.items()}


def _place(name: str) -> tuple[str, ...]:
    """What all spellings of a weight's name have in common: transformers moves parts into `model` and out of it."""
    steps = name.split(".")
    without = {"model", "vision_model"} | ({"language_model"} if "lm_head" in steps else set())
    return tuple(step for step in steps if step not in without)


def _stored_names(base: PreTrainedModel) -> set[str]:
    """What the checkpoint calls its weights, where it can be found."""
    if not base.name_or_path:
        return set()
    revision = getattr(base.config, "_commit_hash", None)
    index = find_file(base.name_or_path, "model.safetensors.index.json", revision)
    if index is not None:
        return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    single = find_file(base.name_or_path, "model.safetensors", revision)
    if single is None:
        return set()
    with safe_open(single, "pt") as file:
        return set(file.keys())


def _cannot(name: str, what: str) -> InputError:
    return InputError(
        f"the policy's adapter cannot be handed over as dense weights: {name} has {what}, and only LoRA matrices and "
        "modules that are trained whole can be. Train another kind of adapter, or generate in transformers "
        "(`use_vllm: false`)"
    )
