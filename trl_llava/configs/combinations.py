"""Combinations of TRL's and transformers' own fields that would end in a traceback when the models are loaded."""

from typing import Any

from trl_llava.configs.limits import beyond_limits
from trl_llava.errors import RecipeError

EVALUATED = ("loss", "runtime", "samples_per_second", "steps_per_second")
"""What an evaluation returns, and so what `metric_for_best_model` can be."""

NEEDED_KWARGS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Of which `lr_scheduler_kwargs` a schedule needs one."""


def check_combinations(values: dict[str, Any], source: str) -> None:
    """Refuse the first combination that cannot work; `values` are all fields as a recipe has them."""
    for problem in (beyond_limits(values), _training(values), _evaluation(values)):
        if problem is not None:
            raise RecipeError(f"{source}: {problem}.")


def _training(values: dict[str, Any]) -> str | None:
    schedule = str(getattr(values.get("lr_scheduler_type"), "value", values.get("lr_scheduler_type")))
    needed, kwargs = NEEDED_KWARGS.get(schedule, ()), values.get("lr_scheduler_kwargs") or {}
    if needed and isinstance(kwargs, dict) and not any(name in kwargs for name in needed):
        return f"`lr_scheduler_type: {schedule}` needs `lr_scheduler_kwargs: {{{needed[0]}: ...}}`"
    if values.get("label_smoothing_factor") and values.get("loss_type") == "chunked_nll":
        found = values["label_smoothing_factor"]
        return f"`label_smoothing_factor` must stay 0 with `loss_type: chunked_nll` (found {found}); choose `nll`"
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if values.get(name)), None)
    if bits and not any(values.get(name) for name in ("use_peft", "adapter_name_or_path", "sft_model_path")):
        return f"`{bits}` needs an adapter, as weights of so few bits are not trained: set `use_peft: true`"
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if values.get(name) and not values.get("dataloader_num_workers"):
            return f"`{name}` needs `dataloader_num_workers` above 0"
    return None


def _evaluation(values: dict[str, Any]) -> str | None:
    strategies = ("eval_strategy", "save_strategy")
    eval_strategy, save_strategy = (getattr(values.get(name), "value", values.get(name)) for name in strategies)
    has_rows = eval_strategy not in (None, "no") or values.get("test_split_size") is not None
    if values.get("eval_on_start") and not has_rows:
        return "`eval_on_start` needs evaluation rows: set `test_split_size` or `eval_strategy`"
    metric = values.get("metric_for_best_model")
    if save_strategy == "best" and metric is None:
        return "`save_strategy: best` needs `metric_for_best_model`, such as loss"
    chooses = save_strategy == "best" or values.get("load_best_model_at_end")
    if chooses and metric is not None and metric.removeprefix("eval_") not in EVALUATED:
        return f"`metric_for_best_model` is {metric!r}, but evaluation gives {', '.join(EVALUATED)}: choose loss"
    return None
