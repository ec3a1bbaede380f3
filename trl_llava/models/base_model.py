"""The model below its adapters."""

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model of transformers that a model is, or that PEFT has wrapped; its layers hold the adapters still."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
