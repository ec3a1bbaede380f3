"""What SFT, DPO, GRPO and RLOO start from: a processor, a model, and the adapter that goes on it."""

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapters import freeze_as_configured, load_adapter, lora_config
from trl_llava.models.load import load_policy, load_processor


def load_recipe_processor(model_args: LlavaModelConfig, chat_template_path: str | None) -> ProcessorMixin:
    """The processor of `model_name_or_path`, with the recipe's `pad_to_square` and chat template."""
    return load_processor(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
        pad_to_square=model_args.pad_to_square,
        chat_template_path=chat_template_path,
    )


def load_policy_start(model_args: LlavaModelConfig) -> tuple[PreTrainedModel | PeftModel, LoraConfig | None]:
    """The policy with the recipe's adapter to train further, or with the configuration of a fresh one."""
    model = load_policy(model_args)
    if model_args.adapter_name_or_path is None:
        return model, lora_config(model_args, model, task="CAUSAL_LM")
    adapter, revision = model_args.adapter_name_or_path, model_args.adapter_revision
    model = load_adapter(model, adapter, is_trainable=True, revision=revision)
    return freeze_as_configured(model, adapter, model_args), None
