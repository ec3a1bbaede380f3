"""The three recipes as keys and values, and as text: sizes that fit the number of rows, paths that are there."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trl_llava.configs.recipe import RecipeDumper
from trl_llava.tools.init.found_files import Found, RowFile

STAGES = ("sft", "reward", "ppo")
HELD_OUT_SHARE = 8
"""One row of so many is held out, where there are enough."""

Values = dict[str, Any]


@dataclass
class Recipe:
    """One stage's recipe on its way to a file: groups of keys, and what its head says."""

    stage: str
    title: str
    path: Path
    rows: RowFile
    groups: dict[str, Values]
    steps: int
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> Values:
        """All keys."""
        return {key: value for group in self.groups.values() for key, value in group.items()}

    def set(self, **values: Any) -> None:
        """Change keys where they are; a new one goes into the last group."""
        for key, value in values.items():
            group = next((group for group in self.groups.values() if key in group), list(self.groups.values())[-1])
            group[key] = value

    def text(self) -> str:
        """The file."""
        head = [self.title, "", f"Command:  trl-llava {self.stage} --config {self.path}", *self.notes]
        lines = [f"# {line}".rstrip() for line in head]
        for name, values in self.groups.items():
            dumped = yaml.dump(values, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=10_000)
            lines += ["", f"# {name}", dumped.rstrip()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Plan:
    """What all recipes of a folder share."""

    found: Found
    recipes: Path  # the folder they go into
    runs: Path
    model: Values  # the base with its template
    on_cpu: bool
    reward_model: str | None  # a published one, instead of one of one's own

    def hardware(self) -> Values:
        """Precision and device."""
        return {"use_cpu": True, "bf16": False} if self.on_cpu else {"bf16": True}


def choose_rows(found: Found) -> dict[str, RowFile]:
    """Stage -> the file that it is to read: one made for it before one that it can read too, then the larger one."""
    chosen = {}
    files = found.files
    sft = [file for file in files if "sft" in file.usable]
    pairs = [file for file in files if "preference" in file.usable]
    prompts = [file for file in files if "prompt" in file.usable]
    if sft:
        # A file without preferences was made for it, unless it has next to nothing that can be used.
        most = max(file.rows_for("sft") for file in sft)
        chosen["sft"] = max(
            sft,
            key=lambda file: (
                10 * file.rows_for("sft") >= most,
                "preference" not in file.usable,
                file.rows_for("sft"),
            ),
        )
    if pairs:
        chosen["reward"] = max(pairs, key=lambda file: (file.captions is not None, file.rows))
    if prompts:
        captioned = bool(pairs) and chosen["reward"].captions is not None
        chosen["ppo"] = max(
            prompts,
            key=lambda file: (
                not captioned or file.captions is not None,
                "sft" not in file.usable,
                "preference" not in file.usable,
                file.rows,
            ),
        )
    return chosen


def write_values(plan: Plan, chosen: dict[str, RowFile]) -> dict[str, Recipe]:
    """The recipes of the stages that these rows and rewards allow."""
    captions = all(stage in chosen and chosen[stage].captions is not None for stage in ("reward", "ppo"))
    recipes = {}
    if "sft" in chosen:
        recipes["sft"] = _sft(plan, chosen["sft"])
    if "reward" in chosen:
        recipes["reward"] = _reward(plan, chosen["reward"], captions)
    if "ppo" in chosen and ("reward" in chosen or plan.reward_model):
        recipes["ppo"] = _ppo(plan, chosen["ppo"], "sft" in chosen, captions or bool(plan.reward_model))
    return recipes


def schedule(rows: int, *, most: int, share: int, least_steps: int) -> tuple[int, int, int]:
    """Rows of a step, epochs and steps: small batches for few rows, so that there are some steps to learn in.

    >>> schedule(64, most=64, share=4, least_steps=20)
    (16, 5, 20)
    >>> schedule(10_000, most=64, share=4, least_steps=20)
    (64, 1, 157)
    """
    batch = 1 << (max(1, min(most, rows // share)).bit_length() - 1)
    epochs = min(5, max(1, math.ceil(least_steps * batch / rows)))
    return batch, epochs, epochs * math.ceil(rows / batch)


def held_out(rows: int) -> int:
    """How many rows are kept for evaluation; none of a handful.

    >>> held_out(64), held_out(15), held_out(100_000)
    (8, 0, 500)
    """
    return 0 if rows < 2 * HELD_OUT_SHARE else min(500, rows // HELD_OUT_SHARE)


def _rows(plan: Plan, file: RowFile, captions: bool = False) -> Values:
    values: Values = {"dataset_name": str(file.path)}
    if file.image_folder is not None:
        values["image_folder"] = str(file.image_folder)
    if captions and file.captions == "joined":
        values["captions_file"] = str(plan.found.captions_file)
    return values


def _batches(plan: Plan, batch: int) -> Values:
    rows = min(batch, 8) if plan.on_cpu else 1
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batch // rows}


def _adapter(plan: Plan) -> Values:
    return {**plan.model, "use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}


def _sft(plan: Plan, file: RowFile) -> Recipe:
    batch, epochs, steps = schedule(file.rows_for("sft"), most=64, share=4, least_steps=20)
    training = {
        "output_dir": str(plan.runs / "sft"),
        "num_train_epochs": epochs,
        **_batches(plan, batch),
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_grad_norm": 1.0,
        **plan.hardware(),
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 1,
    }
    groups = {"Model": _adapter(plan), "Rows": _rows(plan, file), "Training": training}
    return Recipe("sft", "Stage 1: the policy that PPO starts from.", plan.recipes / "sft.yaml", file, groups, steps)


def _reward(plan: Plan, file: RowFile, captions: bool) -> Recipe:
    usable = file.rows_for("preference")
    kept = held_out(usable)
    batch, epochs, steps = schedule(usable - kept, most=32, share=4, least_steps=20)
    rows = {**_rows(plan, file, captions), "with_captions": captions}
    evaluation: Values = {"eval_strategy": "epoch", "per_device_eval_batch_size": 4} if kept else {}
    if kept:
        rows["test_split_size"] = kept
    training = {
        "output_dir": str(plan.runs / "reward"),
        "num_train_epochs": epochs,
        **_batches(plan, batch),
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.1,
        "max_grad_norm": 1.0,
        "reward_centering": "paper",
        **plan.hardware(),
        **evaluation,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 1,
    }
    groups = {"Model": _adapter(plan), "Rows": rows, "Training": training}
    title = "Stage 2: the reward model; it reads " + ("the captions too." if captions else "no captions.")
    return Recipe("reward", title, plan.recipes / "reward.yaml", file, groups, steps)


def _ppo(plan: Plan, file: RowFile, after_sft: bool, captions: bool) -> Recipe:
    usable = file.rows_for("prompt")
    kept = min(held_out(usable), 32)
    batch, epochs, _ = schedule(usable - kept, most=128, share=2, least_steps=20)
    steps = math.ceil(epochs * (usable - kept) / batch)
    start = {"sft_model_path": str(plan.runs / "sft")} if after_sft else _adapter(plan)
    precision = {key: value for key, value in plan.model.items() if key in ("dtype", "pad_to_square")}
    model = {**start, "reward_model_path": plan.reward_model or str(plan.runs / "reward"), **precision}
    rows = _rows(plan, file, captions) | ({"test_split_size": kept} if kept else {})
    training = {
        "output_dir": str(plan.runs / "ppo"),
        "num_train_epochs": epochs,
        **_batches(plan, batch),
        "num_ppo_epochs": 2,
        "local_rollout_forward_batch_size": min(batch, 8) if plan.on_cpu else 1,
        "response_length": 256,
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
        "temperature": 1.0,
        "normalize_scores": "first_batch",
        "kl_coef": 0.1,
        "learning_rate": 3e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        **plan.hardware(),
        "save_steps": max(1, steps // 4),
        "save_total_limit": 2,
        "logging_steps": 1,
    }
    groups = {"Who takes part": model, "Rows": rows, "PPO": training}
    return Recipe("ppo", "Stage 3: PPO.", plan.recipes / "ppo.yaml", file, groups, steps)
