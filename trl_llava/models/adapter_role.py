"""A score-head model without a base of its own: an adapter on another model's base, and a head beside it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from trl_llava.models.adapter_switching import active_adapter
from trl_llava.models.base_model import backbone_of, base_of
from trl_llava.models.load import HEAD
from trl_llava.models.sequence_classification import ImageTextForSequenceClassification

HEAD_KEY = f"base_model.model.{HEAD}."
"""What the head's weights are called in an adapter's file."""


class AdapterRole(ImageTextForSequenceClassification, nn.Module):
    """A score-head model that is an adapter on another model's base: what it computes, without a base of its own.

    It takes the place of a `...ForSequenceClassification`: `model` is the headless model, `score` the head, and
    calling it gives scores. Its host's parameters are not its own: `parameters()` and `state_dict()` hold the head at
    most.
    """

    def __init__(
        self, host: PeftModel, adapter_name: str, head: nn.Linear | None = None, saved_config: PeftConfig | None = None
    ) -> None:
        """Put host, adapter and head together; without `head` it is the host's, which switches with the adapter.

        `saved_config` is the adapter's configuration as it is saved, if the one in the host differs.
        """
        nn.Module.__init__(self)
        base = host.get_base_model()
        # Not registered: an optimizer, a state dict or DDP must meet the host's parameters once, in the host.
        self.__dict__.update(host=host, model=backbone_of(base), base=base)
        if head is None:
            self.__dict__[HEAD] = base.score
        else:
            self.score = head
        self.adapter_name = adapter_name
        self.saved_config = saved_config or host.peft_config[adapter_name]
        self.config = host.config
        self.num_labels = self.score.out_features
        self.name_or_path = base.name_or_path

    @property
    def device(self) -> torch.device:
        """Where the host computes."""
        return self.host.device

    @property
    def dtype(self) -> torch.dtype:
        """What the host computes in."""
        return self.host.dtype

    @contextmanager
    def active(self) -> Iterator["AdapterRole"]:
        """Let the host compute as this role inside a `with` block, where its `model` may be called."""
        with active_adapter(self.host, self.adapter_name):
            yield self

    def forward(self, *args: Any, **kwargs: Any) -> SequenceClassifierOutputWithPast:
        """Score the last real token of each row, as a model with a base of its own does."""
        with self.active():
            return super().forward(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The host's token embeddings."""
        return self.base.get_input_embeddings()

    def to(self, *args: Any, **kwargs: Any) -> "AdapterRole":
        """Move host and head."""
        if not getattr(self.base, "is_quantized", False):  # a quantised one is placed on loading
            self.host.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def weights(self, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The weights of adapter and head, named as in an adapter's file.

        `state_dict` is the host's, if it had to be gathered, with the head's under `score.`.
        """
        own = get_peft_model_state_dict(self.host, state_dict=state_dict, adapter_name=self.adapter_name)
        heads = self.state_dict() if state_dict is None else state_dict
        own |= {f"{HEAD_KEY}{key}": heads[f"{HEAD}.{key}"] for key in ("weight", "bias") if f"{HEAD}.{key}" in heads}
        return {key: value.contiguous() for key, value in own.items()}

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save adapter and head as a PEFT model with a base of its own saves them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.host.create_or_update_model_card(str(folder))
        save_file(self.weights(state_dict), Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(self.saved_config)
        config.inference_mode = True
        config.base_model_name_or_path = config.base_model_name_or_path or self.name_or_path
        config.save_pretrained(str(folder))

    def load_weights(self, weights: dict[str, torch.Tensor]) -> list[str]:
        """Put weights in place, named as in an adapter's file; returns what did not fit, e.g. "missing <name>"."""
        heads = {key: value for key, value in weights.items() if key.startswith(HEAD_KEY)}
        own_head = HEAD in self._modules
        adapter = {key: value for key, value in weights.items() if not (own_head and key in heads)}
        expected = {name for name, _ in self.host.named_parameters() if self.adapter_name in name.split(".")}
        result = set_peft_model_state_dict(self.host, adapter, adapter_name=self.adapter_name)
        problems = [f"missing {key}" for key in sorted(expected & set(result.missing_keys))]
        problems += [f"unexpected {key}" for key in result.unexpected_keys]
        if own_head:
            found = self.score.load_state_dict(
                {key.removeprefix(HEAD_KEY): value for key, value in heads.items()}, strict=False
            )
            problems += [f"missing {HEAD_KEY}{key}" for key in found.missing_keys]
            problems += [f"unexpected {HEAD_KEY}{key}" for key in found.unexpected_keys]
        return problems


def host_of(model: nn.Module) -> nn.Module:
    """The model whose parameters compute: a role's host, or the model itself."""
    return model.host if isinstance(model, AdapterRole) else model


@contextmanager
def computing(model: nn.Module) -> Iterator[nn.Module]:
    """What has `model` and a head, ready to be called in parts: the role, the PEFT model's base or the plain model.

    A role's adapter is active inside the `with` block.
    """
    if isinstance(model, AdapterRole):
        with model.active():
            yield model
    else:
        yield base_of(model)


def cast_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast LoRA weights and score heads of a role, a PEFT model or a plain one; the base stays as it is."""
    for name, parameter in [*model.named_parameters(), *host_of(model).named_parameters()]:
        if "lora_" in name or HEAD in name.split("."):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def in_eval_mode(model: PreTrainedModel | PeftModel | AdapterRole) -> Iterator[None]:
    """Keep a model, or the host of a role, in eval mode; afterwards every module is in the mode it was in."""
    whole = host_of(model)
    training = [module for module in whole.modules() if module.training]
    whole.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
