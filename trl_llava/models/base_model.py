"""The model below its adapters, and the one below its head."""

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model of transformers that a model is, or that PEFT has wrapped; its layers hold the adapters still."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone_of(model: nn.Module) -> PreTrainedModel:
    """The headless model within a model, which may be a PEFT model or a role; one without a head is its own.

    Its `config` is the model's also where DeepSpeed's engine, whose own is another, stands around the model.
    """
    base = base_of(model)
    return getattr(base, getattr(base, "base_model_prefix", ""), base)
