"""The processor that a model was saved with, for trainers that are given none."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from trl_llava.errors import InputError
from trl_llava.models.load import load_processor


def own_processor(model: str | PreTrainedModel | PeftModel, args: Any) -> ProcessorMixin:
    """The processor of a model, or of a Hub ID or folder, as TRL's trainers find it; `args` are the trainer's.

    It has the chat template that `args.chat_template_path` names, so that a trainer has none to set.
    """
    if isinstance(model, str):
        name, revision = model, (args.model_init_kwargs or {}).get("revision")
    else:
        name, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    if not name:
        raise InputError(
            f"`processing_class` is not given, and the {type(model).__name__} does not say where it is from "
            "(`config._name_or_path` is empty): pass its processor"
        )
    return load_processor(
        name,
        revision=revision,
        trust_remote_code=getattr(args, "trust_remote_code", False),
        chat_template_path=getattr(args, "chat_template_path", None),
        field="model",
    )
