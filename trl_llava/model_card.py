"""The model card of a finished run: what it is, how to load it, what it was made of, how it went, and its limits.

TRL's card shows a text pipeline, which none of our three stages can be loaded with.
"""

import html
import json
import math
import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trl_llava.card_plots import plot_curves
from trl_llava.card_samples import SAMPLES
from trl_llava.hub_names import split_revision
from trl_llava.output_dir import RECIPE_FILE, VERSIONS_FILE, versions, write_atomically
from trl_llava.recipe import Recipe
from trl_llava.shareable import without_paths

CURVES_FILE = "curves.png"
_TITLES = {"sft": "policy after supervised fine-tuning", "reward": "factual reward model", "ppo": "policy after PPO"}
_TITLES |= {name: f"policy after {name.upper()}" for name in ("grpo", "rloo", "dpo")}
_POLICY = """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    {peft}
    processor = AutoProcessor.from_pretrained("{name}")
    model = {load}
"""
_REWARD = """
    from trl_llava.factual_reward import FactualReward

    reward = FactualReward.from_pretrained("{name}")
    scores = reward(prompts, completions, images=images, captions=captions)
"""
_DATA_FIELDS = ("dataset_name", "dataset_config", "dataset_train_split", "captions_file", "test_split_size")
_TERM_FIELDS = (
    *("sft_model_path", "reward_model_path", "value_model_path", "reward_funcs", "reward_weights"),
    *("correctness_coef", "yes_no", "length_coef", "missing_eos_penalty", "kl_coef", "beta"),
    *("with_captions", "reward_centering", "center_rewards_coefficient"),
)
_LIMITS = {
    "policy": (
        "Answers may state what is not in the picture; training lowers how often, it does not end it. What its reward "
        "does not see, it may have learnt to exploit: watch the length of answers and the share of things left out."
    ),
    "reward": (
        "Its scores compare answers to one question; they mean nothing across questions, and nothing when it is read "
        "with another prompt than the one in factual_reward.json. It is no judge of facts that neither the picture "
        "nor the captions show."
    ),
}


def write_model_card(
    trainer: Any,
    stage: str,
    base_model: str,
    recipe: Recipe,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """Writes README.md into `output_dir`; takes the place of the trainer's `create_model_card`.

    For a run that is pushed also the curves, and without paths of this machine.

    Args:
        trainer: The trainer of the run.
        stage: "sft", "reward" or "ppo".
        base_model: Hub ID or folder of the base model.
        recipe: The resolved recipe.
        model_name: Name in the title; by default the folder's.
        dataset_name: Hub ID of the data, by default the recipe's.
        tags: Further tags.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    pushed = trainer.hub_model_id is not None
    values = without_paths(recipe.values) if pushed else recipe.values
    names = [tags] if isinstance(tags, str) else list(tags or [])
    adapter = _adapter_config(folder)
    on_hub = not Path(base_model).is_dir()
    metadata = ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation=("finetune" if adapter is None else "adapter") if on_hub else None,
        datasets=_hub_data(dataset_name, recipe) or None,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag=None if stage == "reward" else "image-text-to-text",
        tags=sorted({"trl", "trl-llava", stage, *names}),
    )
    has_curves = pushed and plot_curves(stage, trainer.state.log_history, folder / CURVES_FILE)
    shown = base_model if on_hub or not pushed else Path(base_model).name
    name = trainer.hub_model_id or str(trainer.args.output_dir)
    title = trainer.hub_model_id.split("/")[-1] if pushed else folder.name
    parts = [
        f"# {model_name or title}\n\nA {_TITLES[stage]}, trained from `{shown}` with trl-llava.",
        _loading(stage, shown, name, adapter),
        _made_of(values),
        _how_it_went(trainer, stage, has_curves),
        _samples(folder) if pushed else "",
        f"## Limits\n\n{_LIMITS['reward' if stage == 'reward' else 'policy']}",
        _repeating(stage),
    ]
    body = "\n\n".join(part for part in parts if part)
    write_atomically(folder / "README.md", str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, which also holds near 0 and 1 and for few observations.

    Args:
        share: Observed share.
        count: Number of observations, at least 1.

    Returns:
        Lower and upper end (Wilson 1927, doi:10.1080/01621459.1927.10502953, without continuity correction).

    Example:
        >>> tuple(round(end, 4) for end in wilson_interval(0.8, 10))
        (0.4902, 0.9433)
    """
    z = 1.959963984540054  # the 97.5 % point of the standard normal distribution
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def _loading(stage: str, base_model: str, name: str, adapter: dict[str, Any] | None) -> str:
    load, peft = f'AutoModelForImageTextToText.from_pretrained("{name}")', ""
    if adapter is not None:
        at = f', revision="{adapter["revision"]}"' if adapter.get("revision") else ""
        base = f'AutoModelForImageTextToText.from_pretrained("{base_model}"{at})'
        load, peft = f'PeftModel.from_pretrained({base}, "{name}")', "from peft import PeftModel\n"
    code = _REWARD.format(name=name) if stage == "reward" else _POLICY.format(name=name, peft=peft, load=load)
    return f"## Load it\n\n```python\n{textwrap.dedent(code).strip()}\n```"


def _made_of(values: dict[str, Any]) -> str:
    """Data, terms and weights: what the recipe says about them, beside what it leaves out."""
    rows = [(field, values.get(field)) for field in _DATA_FIELDS + _TERM_FIELDS]
    for source in values.get("datasets") or []:
        rows.append(("datasets", source["path"]))
    lines = [f"| `{field}` | {html.escape(str(value))} |" for field, value in rows if value is not None]
    return "\n".join(["## Made of", "", "| field | value |", "|---|---|", *lines])


def _how_it_went(trainer: Any, stage: str, has_curves: bool) -> str:
    history = trainer.state.log_history if has_curves else []
    lines = ["## How it went", "", f"![curves]({CURVES_FILE})"] if has_curves else []
    held_out = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    if stage == "reward" and held_out and trainer.eval_dataset is not None:
        count = len(trainer.eval_dataset)
        low, high = wilson_interval(held_out[-1], count)
        lines += [
            "",
            f"Prefers the better answer in {held_out[-1]:.1%} of {count} held-out pairs "
            f"(95 % interval {low:.1%} to {high:.1%}, Wilson).",
        ]
    return "\n".join(lines)


def _samples(folder: Path) -> str:
    file = folder / SAMPLES / "samples.json"
    if not file.is_file():
        return ""
    lines = ["## Samples", "", "Not chosen: the first rows with a picture, answered greedily."]
    for sample in json.loads(file.read_text(encoding="utf-8")):
        lines += ["", f"![picture]({sample['picture']})", "", f"> {_quoted(sample['question'])}", ""]
        if "answer" in sample:
            lines.append(_quoted(sample["answer"]))
        for side in ("chosen", "rejected"):
            if side in sample:
                lines.append(f"- {side}, score {sample[side]['score']:.3f}: {_quoted(sample[side]['answer'])}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Text of a data set or model as text: no markup, no picture from elsewhere, in one line."""
    return html.escape(" ".join(text.split())).translate({ord(mark): f"\\{mark}" for mark in "\\`*_[]!#|~"})


def _repeating(stage: str) -> str:
    used = "\n".join(f"- {package}: {version}" for package, version in versions().items())
    return (
        f"## Repeat it\n\n`{RECIPE_FILE}` is the resolved recipe, `{VERSIONS_FILE}` what it ran with:\n\n"
        f"```bash\naccelerate launch -m trl_llava.train_{stage} --config {RECIPE_FILE} --output_dir repeated\n```\n\n"
        f"{used}"
    )


def _adapter_config(folder: Path) -> dict[str, Any] | None:
    """That of the finished run, or of its newest checkpoint; None for a whole model."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for place in (folder, *checkpoints):
        if (place / "adapter_config.json").is_file():
            config: dict[str, Any] = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
            return config
    return None


def _hub_data(dataset_name: str | None, recipe: Recipe) -> list[str]:
    named = [source["path"] for source in recipe.values.get("datasets") or []] or [recipe.values.get("dataset_name")]
    names = [split_revision("dataset_name", name)[0] for name in ([dataset_name] if dataset_name else named) if name]
    return [name for name in names if _is_hub_id(name)]


def _is_hub_id(name: Any) -> bool:
    return (
        isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    )
