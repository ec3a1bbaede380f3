"""The model card of a finished run: what it is, how to load it, and what repeats it.

TRL's card shows a text pipeline, which none of our three stages can be loaded with.
"""

import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trl_llava.hub_names import split_revision
from trl_llava.output_dir import RECIPE_FILE, VERSIONS_FILE, versions, write_atomically
from trl_llava.recipe import Recipe

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
    names = [tags] if isinstance(tags, str) else list(tags or [])
    mixture = [source["path"] for source in recipe.values.get("datasets") or []]
    data_sets = [dataset_name] if dataset_name else mixture or [recipe.values.get("dataset_name")]
    is_adapter = (folder / "adapter_config.json").is_file()
    card_data = ModelCardData(
        base_model=None if Path(base_model).is_dir() else base_model,
        datasets=[split_revision("dataset_name", name)[0] for name in data_sets if _is_hub_id(name)] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=None if stage == "reward" else "image-text-to-text",
        tags=sorted({"trl", "trl-llava", stage, *names}),
    )
    name = trainer.hub_model_id or str(trainer.args.output_dir)
    card = ModelCard(
        f"---\n{card_data.to_yaml()}\n---\n\n{_body(stage, base_model, name, model_name or folder.name, is_adapter)}"
    )
    write_atomically(folder / "README.md", str(card))


def _body(stage: str, base_model: str, name: str, title: str, is_adapter: bool) -> str:
    load = f'AutoModelForImageTextToText.from_pretrained("{base_model if is_adapter else name}")'
    peft = "from peft import PeftModel\n" if is_adapter else ""
    load = f'PeftModel.from_pretrained({load}, "{name}")' if is_adapter else load
    code = _REWARD.format(name=name) if stage == "reward" else _POLICY.format(name=name, peft=peft, load=load)
    used = "\n".join(f"- {package}: {version}" for package, version in versions().items())
    return (
        f"# {title}\n\nA {_TITLES[stage]}, trained from `{base_model}` with trl-llava.\n\n"
        f"## Load it\n\n```python\n{textwrap.dedent(code).strip()}\n```\n\n"
        f"## Repeat it\n\n`{RECIPE_FILE}` is the resolved recipe, `{VERSIONS_FILE}` what it ran with:\n\n"
        f"```bash\naccelerate launch -m trl_llava.train_{stage} --config {RECIPE_FILE} --output_dir repeated\n```\n\n"
        f"{used}\n"
    )


def _is_hub_id(name: Any) -> bool:
    return (
        isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    )
