"""The rewards that a recipe names: the factual reward, and functions of the user's own."""

import functools
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import RecipeError
from trl_llava.hub.lookup import check_there
from trl_llava.models.sharded_weights import loaded_whole
from trl_llava.models.shared_base import SharedBase
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.rewards.functions import RewardFunction


def check_rewards(args: LlavaPPOConfig) -> None:
    """Refuse a recipe without any reward, or with a function that is not there, before a model is loaded."""
    for path in args.reward_funcs or []:
        find_function(path)
    if not any((args.reward_model_path, args.reward_funcs)) and args.correctness_coef is args.length_coef is None:
        raise RecipeError(
            "nothing to learn from: set `reward_model_path`, `reward_funcs`, `correctness_coef` or `length_coef`."
        )


def load_rewards(
    args: LlavaPPOConfig, model_args: LlavaModelConfig, shared: Sequence[SharedBase] = ()
) -> list[RewardFunction]:
    """The rewards of a PPO run, the reward model first; it may use the base of one of the `shared` models."""
    return load_reward_functions(
        args.reward_model_path,
        args.reward_model_revision,
        args.reward_funcs,
        model_args,
        shared=shared,
        batch_size=args.local_rollout_forward_batch_size,
        max_tokens=args.max_tokens_per_micro_batch,
        share_prefix=args.share_prefix,
    )


def load_reward_functions(
    reward_model: str | None,
    revision: str | None,
    functions: list[str] | None,
    model_args: LlavaModelConfig,
    *,
    shared: Sequence[SharedBase] = (),
    **settings: Any,
) -> list[RewardFunction]:
    """The factual reward, if one is named, on this process's device, and the recipe's own functions behind it.

    Args:
        reward_model: `FactualReward` checkpoint.
        revision: Branch, tag or commit of it.
        functions: Paths "package.module:function" or "file.py:function".
        model_args: dtype, quantisation and attention of the reward model.
        shared: Loaded models, one of whose bases the reward model may use.
        **settings: `batch_size`, `max_tokens` and `share_prefix` of the factual reward.

    Returns:
        Reward functions.
    """
    own = [find_function(path) for path in functions or []]  # before anything large is loaded
    rewards: list[RewardFunction] = []
    if reward_model is not None:
        check_there("reward_model_path", reward_model, revision)
        # Each process scores its own completions, in as many passes as that needs: no weights that all fetch together.
        bases = () if is_deepspeed_zero3_enabled() else shared
        with loaded_whole():
            rewards.append(
                FactualReward.from_pretrained(
                    reward_model, revision=revision, model_args=model_args, shared=bases, **settings
                )
            )
    return rewards + own


def find_function(path: str) -> RewardFunction:
    """Import a reward function by its path: "package.module:function", or "file.py:function" from here."""
    place, _, name = path.rpartition(":")
    if not name or not place:
        raise RecipeError(f"`reward_funcs`: {path!r} must be 'package.module:function' or 'file.py:function'.")
    is_file = place.endswith(".py")
    if is_file and not Path(place).expanduser().is_file():
        raise RecipeError(
            f"`reward_funcs`: there is no file {place} of {path!r}; a relative path is seen from {Path.cwd()}."
        )
    try:
        found: Any = _load_file(Path(place).expanduser().resolve()) if is_file else importlib.import_module(place)
    except Exception as error:  # whatever the user's own code raises
        raise RecipeError(f"`reward_funcs`: {place} of {path!r} cannot be imported: {_where(error)}.") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise RecipeError(f"`reward_funcs`: {place} has no function {name!r}.")
    if not callable(found):
        raise RecipeError(f"`reward_funcs`: {name!r} of {place} is {found!r:.80}, expected a function.")
    return found


@functools.cache
def _load_file(path: Path) -> ModuleType:
    """The module of a file, once for all of its functions; what lies beside it can be imported from it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"reward_functions_in_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look for it there
    spec.loader.exec_module(module)
    return module


def _where(error: Exception) -> str:
    """What an import raised, with the line where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (last.filename, last.lineno)
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    at = "" if file is None or file.startswith("<frozen") else f" ({file}, line {line})"
    return f"{type(error).__name__}: {text[:300]}{at}"
