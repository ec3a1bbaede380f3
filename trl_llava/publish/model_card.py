"""The model card of a run: what it is, how to load it, what it was made of, how it went, and its limits.

TRL's card shows a text pipeline, which none of our stages can be loaded with.
"""

import html
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trl_llava.hub.names import split_revision
from trl_llava.publish.card_numbers import read_numbers, results_of, section_of
from trl_llava.publish.card_plots import plot_curves
from trl_llava.publish.shareable import FACTS_FILE, SAMPLES, without_paths
from trl_llava.run.alarms import Alarm, read_alarms
from trl_llava.run.atomic_files import write_atomically
from trl_llava.run.output_dir import RECIPE_FILE, VERSIONS_FILE
from trl_llava.run.versions import versions

CURVES_FILE = "curves.png"
TITLES = {"sft": "policy after supervised fine-tuning", "reward": "factual reward model"}
TITLES |= {name: f"policy after {name.upper()}" for name in ("ppo", "grpo", "rloo", "dpo")}
_POLICY = """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    {peft}
    processor = AutoProcessor.from_pretrained("{name}")
    model = {load}
"""
_REWARD = """
    from trl_llava.rewards.factual_reward import FactualReward

    reward = FactualReward.from_pretrained("{name}")
    scores = reward(prompts, completions, images=images, captions=captions)
"""
_MADE_OF = (
    *("dataset_name", "dataset_config", "dataset_train_split", "captions_file", "test_split_size"),
    *("sft_model_path", "reward_model_path", "value_model_path", "reward_funcs", "reward_weights"),
    *("correctness_coef", "yes_no", "length_coef", "missing_eos_penalty", "kl_coef", "beta"),
    *("with_captions", "reward_centering", "center_rewards_coefficient"),
)
_LIMITS = {
    "policy": (
        "Completions may state what is not in the image; training lowers how often, it does not end it. What its "
        "reward does not see, it may have learnt to exploit: watch the length of completions and the share of things "
        "left out."
    ),
    "reward": (
        "Its scores compare completions of one prompt; they mean nothing across prompts, and nothing when it is used "
        "with another judging prompt than the one in factual_reward.json. It is no judge of facts that neither the "
        "image nor the captions show."
    ),
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says that neither the log nor the folder's files say: recipe fields, Hub IDs of data, held-out rows.

    It lies in card.json, so that the card can be written when the process is gone.
    """

    stage: str
    base_model: str
    made_of: dict[str, Any]
    datasets: list[str]
    held_out: int

    def save(self, folder: Path) -> None:
        """Write card.json into the folder of the run."""
        write_atomically(folder / FACTS_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "CardFacts":
        """Read card.json."""
        return cls(**json.loads((folder / FACTS_FILE).read_text(encoding="utf-8")))


def card_facts(trainer: Any, stage: str, base_model: str, values: dict[str, Any]) -> CardFacts:
    """Collect what a trainer and the fields of its recipe or config know."""
    known = made_of(values)
    held_out = trainer.eval_dataset
    rows = 0 if held_out is None or isinstance(held_out, dict) else len(held_out)
    return CardFacts(stage, base_model, known, _hub_data(known.get("datasets") or [known.get("dataset_name")]), rows)


def made_of(values: dict[str, Any]) -> dict[str, Any]:
    """What a model was made of: those fields of a recipe that say it, as far as they are set."""
    sources = [source["path"] for source in values.get("datasets") or []]
    found = {field: values.get(field) for field in _MADE_OF} | {"datasets": sources or None}
    if found["correctness_coef"] is None:
        found["yes_no"] = None  # it says how that term counts
    return {field: value for field, value in found.items() if value is not None}


def write_card_of(
    trainer: Any,
    stage: str,
    base_model: str,
    values: dict[str, Any],
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """Write the card of a trainer's run; takes the place of its `create_model_card`, with that one's arguments."""
    if not trainer.is_world_process_zero():
        return
    facts = card_facts(trainer, stage, base_model, values)
    if dataset_name is not None:
        facts = replace(facts, datasets=_hub_data([dataset_name]))
    folder = Path(trainer.args.output_dir)
    facts.save(folder)
    write_model_card(folder, facts, trainer.state.log_history, trainer.hub_model_id, model_name, tags)


def write_model_card(
    folder: Path,
    facts: CardFacts,
    log_history: Sequence[dict[str, Any]],
    hub_id: str | None,
    model_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """Write README.md into the folder of a run; if it is pushed also the curves, and no paths of this machine."""
    pushed, stage = hub_id is not None, facts.stage
    adapter, on_hub = _adapter_config(folder), not Path(facts.base_model).is_dir()
    has_curves = pushed and plot_curves(stage, log_history, folder / CURVES_FILE)
    shown = facts.base_model if on_hub or not pushed else Path(facts.base_model).name
    numbers = read_numbers(folder)
    title = model_name or (folder.name if hub_id is None else hub_id.split("/")[-1])
    parts = [
        f"# {title}\n\nA {TITLES[stage]}, trained from `{shown}` with trl-llava.",
        _loading(stage, shown, hub_id or str(folder), adapter),
        _made_of(without_paths(facts.made_of) if pushed else facts.made_of),
        _how_it_went(log_history, stage, facts.held_out) if has_curves else "",
        _samples(folder / SAMPLES / "samples.json") if pushed else "",
        section_of(numbers),
        _alarms(read_alarms(folder)),
        f"## Limits\n\n{_LIMITS['reward' if stage == 'reward' else 'policy']}",
        _repeating(folder, stage),
    ]
    body = "\n\n".join(part for part in parts if part)
    metadata = ModelCardData(
        base_model=facts.base_model if on_hub else None,
        base_model_relation=("finetune" if adapter is None else "adapter") if on_hub else None,
        datasets=facts.datasets or None,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag=None if stage == "reward" else "image-text-to-text",
        model_name=title if numbers else None,
        eval_results=results_of(numbers) or None,
        tags=sorted({"trl", "trl-llava", stage, *([tags] if isinstance(tags, str) else tags or [])}),
    )
    write_atomically(folder / "README.md", str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` observations, which also holds near 0 and 1 and for few of them.

    Wilson 1927, doi:10.1080/01621459.1927.10502953, without continuity correction.

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
    lines = []
    for field, value in values.items():
        cells = [html.escape(str(one)).replace("|", "\\|") for one in (value if isinstance(value, list) else [value])]
        lines.append(f"| `{field}` | {', '.join(cells)} |")
    return "" if not lines else "\n".join(["## Made of", "", "| field | value |", "|---|---|", *lines])


def _how_it_went(history: Sequence[dict[str, Any]], stage: str, held_out: int) -> str:
    text = f"## How it went\n\n![curves]({CURVES_FILE})"
    accuracies = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    if stage == "reward" and accuracies and held_out:
        low, high = wilson_interval(accuracies[-1], held_out)
        text += (
            f"\n\nPrefers the chosen completion in {accuracies[-1]:.1%} of {held_out} held-out pairs "
            f"(95 % interval {low:.1%} to {high:.1%}, Wilson)."
        )
    return text


def _alarms(alarms: Sequence[Alarm]) -> str:
    lines = [f"- After step {alarm['step']}: {alarm['message']}." for alarm in alarms]
    return "" if not lines else "\n".join(["## Alarms", "", "Said while the model was trained:", "", *lines])


def _samples(file: Path) -> str:
    if not file.is_file():
        return ""
    samples = json.loads(file.read_text(encoding="utf-8"))
    scored = any("chosen" in sample for sample in samples)
    how = "both completions scored" if scored else "completed greedily"
    lines = ["## Samples", "", f"Not selected: the first rows with an image, {how}."]
    for sample in samples:
        lines += ["", f"![image]({sample['image']})", "", f"> {_quoted(sample['prompt'])}", ""]
        if "completion" in sample:
            lines.append(_quoted(sample["completion"]))
        for side in ("chosen", "rejected"):
            if side in sample:
                lines.append(f"- {side}, score {sample[side]['score']:.3f}: {_quoted(sample[side]['completion'])}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Text of a data set or model as text: no markup, no image from elsewhere, in one line."""
    return html.escape(" ".join(text.split())).translate({ord(mark): f"\\{mark}" for mark in "\\`*_[]!#|~"})


def _repeating(folder: Path, stage: str) -> str:
    file = folder / VERSIONS_FILE  # written when the run began, which may be long ago
    ran_with = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else versions()
    used = "\n".join(f"- {package}: {version}" for package, version in ran_with.items())
    if not (folder / RECIPE_FILE).is_file():
        return f"## Versions\n\n{used}"
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


def _hub_data(names: Iterable[str | None]) -> list[str]:
    """Those of the names that are Hub IDs, without their revisions."""
    found = [split_revision("dataset_name", name)[0] for name in names if name]
    return [
        name for name in found if name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    ]
