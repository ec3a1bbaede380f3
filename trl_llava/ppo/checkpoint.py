"""What a PPO checkpoint holds beyond TRL's: both roles' weights, and what rewards are normalised with.

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

from trl_llava.errors import InputError, NotFoundError
from trl_llava.models.adapter_role import AdapterRole
from trl_llava.ppo.scoring import Scorer
from trl_llava.run.full_weights import load_full_weights

STATE_FILE = "ppo_state.json"
VALUE_FOLDER = "value_model"
ROLES = {"policy": ".", "value_model": VALUE_FOLDER}
"""Attribute of `PolicyAndValue` -> folder inside a checkpoint."""


def save_roles(model: nn.Module, state: dict[str, torch.Tensor], folder: Path, adapter_name: str) -> None:
    """Save policy and value model, each so that `from_pretrained` loads it.

    Args:
        model: a `PolicyAndValue`, unwrapped.
        state: its whole state dict.
        folder: where the policy goes; the value model goes to `value_model/` in it.
        adapter_name: the trained adapter of PEFT models.
    """
    for role, place in ROLES.items():
        part = getattr(model, role)
        prefix = f"{role}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if isinstance(part, AdapterRole):  # its adapter is among the policy's weights
            own |= {key.removeprefix("policy."): value for key, value in state.items() if key.startswith("policy.")}
        adapters = {"selected_adapters": [adapter_name]} if isinstance(part, PeftModel) else {}
        part.save_pretrained(folder / place, state_dict=own, **adapters)


def load_roles(model: nn.Module, folder: Path, adapter_name: str) -> None:
    """Put the saved weights of policy and value model in place.

    Args:
        model: a `PolicyAndValue`, unwrapped.
        folder: a checkpoint.
        adapter_name: the trained adapter of PEFT models.

    Raises:
        ValueError: if the checkpoint misses weights of an adapter, or has some that the adapter has no place for.
    """
    for role, place in ROLES.items():
        part = getattr(model, role)
        if isinstance(part, AdapterRole):
            _check_all_placed(part.load_weights(load_peft_weights(str(folder / place), device="cpu")), folder / place)
        elif isinstance(part, PeftModel):
            _load_adapter_weights(part, folder / place, adapter_name)
        else:
            load_full_weights(part, folder / place)


def _load_adapter_weights(model: PeftModel, folder: Path, adapter_name: str) -> None:
    weights = load_peft_weights(str(folder), device="cpu")
    own = {name for name in model.state_dict() if f".{adapter_name}." in name or name.endswith(f".{adapter_name}")}
    result = set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    missing = sorted(own & set(result.missing_keys))
    problems = [f"missing {key}" for key in missing] + [f"unexpected {key}" for key in result.unexpected_keys]
    _check_all_placed(problems, folder)


def _check_all_placed(problems: list[str], folder: Path) -> None:
    if problems:
        raise InputError(
            f"checkpoint {folder} does not fit this run's adapter; first of {len(problems)} problems: {problems[0]}. "
            "Resume with the recipe that wrote it"
        )


def save_state(scorer: Scorer, folder: Path) -> None:
    """Save what is neither weights nor trainer state.

    Args:
        scorer: the run's scorer.
        folder: a checkpoint.
    """
    (folder / STATE_FILE).write_text(json.dumps({"normalisers": scorer.normalisers}, indent=2) + "\n")


def load_state(scorer: Scorer, folder: Path) -> None:
    """Restore it.

    Args:
        scorer: the run's scorer.
        folder: a checkpoint.

    Raises:
        FileNotFoundError: if the folder is no PPO checkpoint.
    """
    if not (folder / STATE_FILE).is_file():
        raise NotFoundError(f"{folder} is not a checkpoint of LlavaPPOTrainer: it has no {STATE_FILE}")
    state = json.loads((folder / STATE_FILE).read_text())
    scorer.normalisers = {name: tuple(numbers) for name, numbers in state["normalisers"].items()}


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore an optimizer that every process holds whole.

    Args:
        optimizer: the run's optimizer.
        folder: a checkpoint.

    Raises:
        FileNotFoundError: if the checkpoint was saved without it.
        ValueError: if it was saved for other parameters.
    """
    if not (folder / "optimizer.pt").is_file():
        raise NotFoundError(
            f"{folder} has no optimizer.pt (was it written with `save_only_model: true`?), so a run cannot go on from "
            "it. Start a new run with its adapter as `sft_model_path`"
        )
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        average = optimizer.state[parameter].get("exp_avg", parameter)
        if average.shape != parameter.shape:  # with another `share_base` the parameters come in another order
            raise InputError(
                f"{folder}/optimizer.pt is of other parameters, or of the same in another order: it "
                f"has {tuple(average.shape)} for a parameter of {tuple(parameter.shape)}. Resume with the recipe that "
                "wrote it"
            )


def load_scheduler(scheduler: torch.optim.lr_scheduler.LRScheduler, folder: Path) -> None:
    """Restore the learning-rate schedule.

    Args:
        scheduler: the run's scheduler.
        folder: a checkpoint.
    """
    scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
