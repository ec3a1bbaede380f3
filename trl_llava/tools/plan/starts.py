"""What a model of a recipe starts from: read where it is, or from the recipe of the stage that has yet to write it."""

import copy
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedConfig

from trl_llava.configs.recipe import make_parser
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError, NotFoundError, RecipeError
from trl_llava.hub.lookup import check_there, local_base
from trl_llava.models.load import load_config
from trl_llava.models.starts import agreed_base


@dataclass(frozen=True)
class Sources:
    """Where to look for what an earlier stage has yet to write."""

    base: str | None = None  # Hub ID or folder that `--base` names
    recipe: str | None = None  # path of the planned recipe; those beside it may say what will be written
    remote: bool = False  # trust_remote_code


@dataclass(frozen=True)
class Start:
    """What a role starts from: a base, and an adapter on it or none."""

    config: PreTrainedConfig  # of the base
    name: str  # Hub ID or folder of the base
    adapter: LoraConfig | None = None  # if it is there already
    shape: LlavaModelConfig | None = None  # if it has yet to be written: the model fields whose `lora_*` say its shape
    notes: tuple[str, ...] = field(default=(), compare=False)  # what the plan has taken from elsewhere

    @property
    def has_adapter(self) -> bool:
        """Whether it is an adapter, there already or not."""
        return self.adapter is not None or self.shape is not None


def read_recipe(stage: str, words: list[str]) -> tuple[Any, LlavaModelConfig]:
    """The stage's config and model fields of `--config` and overrides, as on a machine that has a GPU."""
    parser = make_parser(stage, f"trl-llava plan ({stage})")
    values = parser.check(words).values
    # A config refuses precisions that this machine has not, which does not matter.
    parsed = parser.parse([*words, "--use_cpu", "--bf16", "false", "--fp16", "false"])
    args, model_args = parsed.training_args, parsed.model_args
    args.bf16, args.fp16 = values["bf16"], values["fp16"]
    model_args.trust_remote_code = args.trust_remote_code
    return args, model_args


def find_start(
    name_of_field: str,
    name: str | None,
    revision: str | None,
    sources: Sources,
    lora: LlavaModelConfig,
    given: str | None = None,
) -> Start:
    """What a field of a recipe names: a model, an adapter on one, or what an earlier stage will write.

    `lora` says the shape of an adapter that nothing else says; `given` is the recipe's base of an adapter.
    """
    if name is None:
        raise InputError(f"{name_of_field} is not set; a plan needs to know the model")
    try:
        folder = _local(name_of_field, name, revision, sources.remote)
    except NotFoundError as error:
        earlier = recipe_that_writes(name, sources.recipe)
        if earlier is None and sources.base is None:
            raise NotFoundError(
                f"{error}. If an earlier stage has yet to write it, give its base model with --base (a plan looks for "
                "the stage's recipe beside this one, and found none whose output_dir this is)"
            ) from error
        return _to_come(name_of_field, name, earlier, sources, lora)
    if not Path(folder, "adapter_config.json").is_file():
        return Start(load_config(name_of_field, folder, None, sources.remote), name)
    adapter = PeftConfig.from_pretrained(folder)
    if not isinstance(adapter, LoraConfig):
        raise InputError(f"{name_of_field}: '{name}' is a {adapter.peft_type} adapter; a plan knows LoRA")
    base = agreed_base(given, name, local_base(name, adapter.base_model_name_or_path))
    base_folder = _local(f"the base of {name_of_field}", base, adapter.revision, sources.remote)
    return Start(load_config(name_of_field, base_folder, None, sources.remote), base, adapter)


def base_config(model_args: LlavaModelConfig, sources: Sources) -> Start:
    """What `model_name_or_path` names; `--base` where that is not there."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    try:
        folder = _local("model_name_or_path", name, revision, sources.remote)
    except NotFoundError:
        if sources.base is None:
            raise
        notes = (f"{name} is not there: planned for {sources.base} (--base)",)
        name, folder = sources.base, _local("--base", sources.base, None, sources.remote)
        return Start(load_config("--base", folder, None, sources.remote), name, notes=notes)
    return Start(load_config("model_name_or_path", folder, None, sources.remote), str(name))


@lru_cache(maxsize=8)
def recipe_that_writes(name: str, recipe: str | None) -> tuple[str, Any, LlavaModelConfig] | None:
    """The recipe beside `recipe` whose run will write a folder, or a checkpoint in it: path, config, model fields."""
    if recipe is None:
        return None
    wanted = {os.path.normpath(name), os.path.dirname(os.path.normpath(name))}
    for path in sorted(Path(recipe).parent.glob("*.yaml")):
        stage = path.stem.split("_")[0]
        try:
            keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # nobody has said that it is a recipe
        writes = isinstance(keys, dict) and os.path.normpath(str(keys.get("output_dir"))) in wanted
        if writes and stage in ("sft", "reward", "ppo", "dpo"):
            return str(path), *read_recipe(stage, ["--config", str(path)])
    return None


def judged_length(reward_model: str, sources: Sources) -> tuple[int, str] | None:
    """The longest row that a reward model was trained on, which is the longest that it reads, and what says so.

    That is the recipe of its own run, or the one beside the planned one; None if neither says it.
    """
    own = Path(reward_model, "recipe.yaml")
    if own.is_file():
        length = yaml.safe_load(own.read_text(encoding="utf-8")).get("max_length")
        return (length, f"max_length of {own}") if length else None
    earlier = recipe_that_writes(reward_model, sources.recipe)
    if earlier is None or not getattr(earlier[1], "max_length", None):
        return None
    return earlier[1].max_length, f"max_length of {earlier[0]}"


def _to_come(
    name_of_field: str,
    name: str,
    earlier: tuple[str, Any, LlavaModelConfig] | None,
    sources: Sources,
    lora: LlavaModelConfig,
) -> Start:
    """What will be written: as the stage's recipe says, or an adapter of this recipe's `lora_*` on `--base`."""
    shape, base = copy.copy(lora), sources.base
    notes = [f"{name} is not there yet: planned for an adapter on {base} (--base), lora_r {shape.lora_r}"]
    shape.use_peft = True
    if earlier is not None:
        file, shape = earlier[0], copy.copy(earlier[2])
        if shape.adapter_name_or_path and not shape.use_peft:
            raise RecipeError(
                f"{name_of_field}: {name} is not there yet, and {file} goes on with the adapter "
                f"{shape.adapter_name_or_path}: plan that stage first, or give a {name_of_field} that is there."
            )
        base = base or shape.model_name_or_path
        what = f"an adapter of lora_r {shape.lora_r} on {base}" if shape.use_peft else f"a whole model like {base}"
        notes = [f"{name} is not there yet: planned for {what}, as {file} says"]
    its_base = f"{name_of_field} is not there yet; its base"
    revision = shape.model_revision if base == shape.model_name_or_path else None
    folder = _local(its_base, base, revision, sources.remote)
    config = load_config(its_base, folder, None, sources.remote)
    if not shape.use_peft:
        return Start(config, name, notes=tuple(notes))
    return Start(config, str(base), shape=shape, notes=tuple(notes))


def _local(name_of_field: str, name: str | None, revision: str | None, remote: bool) -> str:
    """The folder with a model's config; from the cache, where `check_there` has put it, so that nobody asks again.

    A model with code of its own keeps its Hub ID, which that code is found by.
    """
    there = check_there(name_of_field, name, revision)
    if Path(there).is_dir() or remote:
        return there
    for file in ("adapter_config.json", "config.json"):
        found = try_to_load_from_cache(there, file, revision=revision)
        if isinstance(found, str):
            return str(Path(found).parent)
    return there
