"""What SFT, DPO, GRPO and RLOO train: a processor, a model, and the adapter that goes on it."""

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapters import freeze_as_asked, load_adapter, lora_config
from trl_llava.models.load import load_policy, load_processor


def load_recipe_processor(model_args: LlavaModelConfig, chat_template_path: str | None) -> ProcessorMixin:
    """Loads the processor of `model_name_or_path` as the recipe wants it.

    Args:
        model_args: The model, and `pad_to_square`.
        chat_template_path: Chat template instead of the saved one.

    Returns:
        The processor.

    Raises:
        OSError: If there is no such model or chat template.
        ValueError: If a part is missing that training needs.
    """
    return load_processor(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
        pad_to_square=model_args.pad_to_square,
        chat_template_path=chat_template_path,
    )


def load_policy_start(model_args: LlavaModelConfig) -> tuple[PreTrainedModel | PeftModel, LoraConfig | None]:
    """Loads the policy: with the recipe's adapter to go on with, or with the shape of a fresh one.

    Args:
        model_args: Base, adapter, quantisation, what is frozen.

    Returns:
        The model, and what the trainer shall put on it.

    Raises:
        OSError: If there is no such model.
        ValueError: If the adapter does not fit the base, or a part shall be trained that it does not hold.
    """
    model = load_policy(model_args)
    if model_args.adapter_name_or_path is None:
        return model, lora_config(model_args, model, task="CAUSAL_LM")
    adapter, revision = model_args.adapter_name_or_path, model_args.adapter_revision
    model = load_adapter(model, adapter, is_trainable=True, revision=revision)
    return freeze_as_asked(model, adapter, model_args), None
