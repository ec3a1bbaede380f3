"""Values of TRL's and transformers' fields that those take, and fail on in the middle of a run, or go wrong with."""

from collections.abc import Mapping
from typing import Any

_RANGES = {
    "be above 0": (
        lambda value: value > 0,
        "adam_epsilon dataset_num_proc eval_accumulation_steps eval_steps generation_batch_size logging_steps "
        "lora_alpha max_completion_length num_generations num_iterations per_device_train_batch_size "
        "repetition_penalty save_steps steps_per_generation",
    ),
    "not be negative": (
        lambda value: value >= 0,
        "cliprange cliprange_value dataloader_num_workers eval_delay learning_rate neftune_noise_alpha "
        "num_train_epochs vf_coef weight_decay max_grad_norm",  # which would turn every gradient round
    ),
    "be from 0 to 1": (
        lambda value: 0 <= value <= 1,
        "adam_beta1 adam_beta2 gamma label_smoothing_factor lam lora_dropout top_entropy_quantile warmup_ratio",
    ),
    "be from 0 to 2**32 - 1": (lambda value: 0 <= value < 2**32, "caption_seed data_seed seed"),  # as NumPy takes them
}
_MAPPINGS = (
    "activation_checkpointing_kwargs chat_template_kwargs generation_kwargs gradient_checkpointing_kwargs "
    "lr_scheduler_kwargs"
)


def beyond_limits(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the first value that is out of its range."""
    for expected, (fits, names) in _RANGES.items():
        for name in names.split():
            value = values.get(name)
            if isinstance(value, (int, float)) and not fits(value):
                return f"`{name}` must {expected}, found {value}"
    for name, value in values.items():
        if value == "" and name.endswith(("_path", "_file", "_folder", "_revision", "_split")):
            return f"`{name}` is an empty text: leave it out"
    for name in _MAPPINGS.split():
        value = values.get(name)
        if isinstance(value, str) and not value.startswith("{"):
            return f"`{name}` must be a mapping, found {value!r}"
    if any("=" not in part for part in (values.get("optim_args") or "=").replace(" ", "").split(",")):
        return f"`optim_args` must be like `name=value,name=value`, found {values['optim_args']!r}"
    if values.get("num_generations", 2) is None:
        return "`num_generations` must be a number of 2 or more"
    if values.get("importance_sampling_level", "token") not in ("token", "sequence"):
        return f"`importance_sampling_level` must be token or sequence, found {values['importance_sampling_level']!r}"
    if values.get("model_init_kwargs"):
        return "`model_init_kwargs` is not read: set `dtype`, `attn_implementation` and the like"
    return None
