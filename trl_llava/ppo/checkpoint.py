"""What a PPO run saves and resumes from: policy, value model, optimizer, schedule, counters and normalisers.

A checkpoint folder holds the policy (its adapter alone, if it has one), `value_model/` with head, optimizer,
scheduler, trainer state, and `ppo_state.json`. Nothing random is needed: every draw is a function of seed, step and
row.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from trl_llava.errors import InputError
from trl_llava.models.adapter_role import AdapterRole
from trl_llava.ppo.scoring import Scorer
from trl_llava.run.checkpoint_folders import NoCheckpointError
from trl_llava.run.safe_checkpoints import SafeCheckpoints, load_full_weights

STATE_FILE = "ppo_state.json"
VALUE_FOLDER = "value_model"
VALUE_README = """# Value model

The value model (critic) of the PPO run in the folder above, as it was when that was saved: it estimates the return of
the policy's completions, token by token, and is no reward model. `value_model_path` lets another run start from it.
"""
ROLES = {"policy": ".", "value_model": VALUE_FOLDER}
"""Attribute of `PolicyAndValue` -> folder inside a checkpoint."""
_KEPT = ("global_step", "episode", "epoch", "log_history", "best_metric", "best_model_checkpoint")
_ADAPTER = "default"


class PPOCheckpoints(SafeCheckpoints):
    """Mixed into the PPO trainer, before it: both models are saved and restored, whatever shards them."""

    scorer: Scorer

    def restore(self, checkpoint: str) -> None:
        """Put everything back as it was when a checkpoint was written."""
        folder = Path(checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise NoCheckpointError(f"{folder} is not a checkpoint of LlavaPPOTrainer: it has no {STATE_FILE}")
        normalisers = json.loads((folder / STATE_FILE).read_text())["normalisers"]
        self.scorer.normalisers = {name: tuple(numbers) for name, numbers in normalisers.items()}
        saved = type(self.state).load_from_json(str(folder / "trainer_state.json"))
        for name in _KEPT:
            setattr(self.state, name, getattr(saved, name))
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model, str(folder), load_module_strict=False)
        else:
            load_roles(self.accelerator.unwrap_model(self.model), folder)
            load_optimizer(self.optimizer, folder)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        self._load_rng_state(checkpoint)  # our own draws need none; a reward function of the user's may

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy (its adapter alone, if it has one) and, in `value_model/`, the value model with its head.

        Args:
            output_dir: folder; `args.output_dir` by default.
            _internal_call: `True` keeps `push_to_hub` from pushing.
        """
        folder = Path(output_dir or self.args.output_dir)
        state = self.accelerator.get_state_dict(self.model)  # gathers what is sharded, so every process calls it
        if self.args.should_save:
            save_roles(self.accelerator.unwrap_model(self.model), state, folder)
            self.processing_class.save_pretrained(folder)
            (folder / STATE_FILE).write_text(json.dumps({"normalisers": self.scorer.normalisers}, indent=2) + "\n")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def save_roles(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Save both roles of an unwrapped `PolicyAndValue`, from its state dict, so that `from_pretrained` loads each."""
    for role, place in ROLES.items():
        part = getattr(model, role)
        prefix = f"{role}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if isinstance(part, AdapterRole):  # its adapter is among the policy's weights
            own |= {key.removeprefix("policy."): value for key, value in state.items() if key.startswith("policy.")}
        adapters = {"selected_adapters": [_ADAPTER]} if isinstance(part, PeftModel) else {}
        part.save_pretrained(folder / place, state_dict=own, **adapters)
        readme = folder / VALUE_FOLDER / "README.md"
        if place == VALUE_FOLDER and readme.is_file():  # PEFT's, a form that nobody fills in
            readme.write_text(VALUE_README, encoding="utf-8")


def load_roles(model: nn.Module, folder: Path) -> None:
    """Put the saved weights of both roles of an unwrapped `PolicyAndValue` in place."""
    for role, place in ROLES.items():
        part = getattr(model, role)
        problems: list[str] = []
        if isinstance(part, AdapterRole):
            problems = part.load_weights(load_peft_weights(str(folder / place), device="cpu"))
        elif isinstance(part, PeftModel):
            problems = _load_adapter_weights(part, folder / place)
        else:
            load_full_weights(part, folder / place)
        if problems:
            raise InputError(
                f"checkpoint {folder / place} does not fit this run's adapter; first of {len(problems)} problems: "
                f"{problems[0]}. Resume with the recipe that wrote it"
            )


def _load_adapter_weights(model: PeftModel, folder: Path) -> list[str]:
    """Load the weights; returns those that are missing or have no place."""
    own = {name for name in model.state_dict() if f".{_ADAPTER}." in name or name.endswith(f".{_ADAPTER}")}
    result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=_ADAPTER)
    missing = sorted(own & set(result.missing_keys))
    return [f"missing {key}" for key in missing] + [f"unexpected {key}" for key in result.unexpected_keys]


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore an optimizer that every process holds whole, and refuse one of other parameters."""
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        average = optimizer.state[parameter].get("exp_avg", parameter)
        if average.shape != parameter.shape:  # with another `share_base` the parameters come in another order
            raise InputError(
                f"{folder}/optimizer.pt is of other parameters, or of the same in another order: it "
                f"has {tuple(average.shape)} for a parameter of {tuple(parameter.shape)}. Resume with the recipe that "
                "wrote it"
            )
