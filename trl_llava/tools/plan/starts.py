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
from trl_llava.hub.lookup import check_there
from trl_llava.models.load import load_config
from trl_llava.models.starts import agreed_base


@dataclass(frozen=True)
class Earlier:
    """The recipe of an earlier stage, beside the one that is planned.

    Attributes:
        file: Its path.
        values: Every field.
        model_args: Its model fields.
    """

    file: str
    values: dict[str, Any]
    model_args: LlavaModelConfig


@dataclass(frozen=True)
class Sources:
    """Where to look for what an earlier stage has yet to write.

    Attributes:
        base: Hub ID or folder that `--base` names.
        recipe: Path of the planned recipe; those beside it may say what will be written.
        remote: `trust_remote_code`.
    """

    base: str | None = None
    recipe: str | None = None
    remote: bool = False


@dataclass(frozen=True)
class Start:
    """What a role starts from.

    Attributes:
        config: Of its base model.
        name: Hub ID or folder of the base.
        adapter: Config of the adapter on it; None for a whole model, or where it has yet to be written.
        shape: Where an adapter has yet to be written, the model fields whose `lora_*` say its shape.
        notes: What the plan has taken from elsewhere.
    """

    config: PreTrainedConfig
    name: str
    adapter: LoraConfig | None = None
    shape: LlavaModelConfig | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def has_adapter(self) -> bool:
        """Whether it is an adapter.

        Returns:
            Whether, there already or not.
        """
        return self.adapter is not None or self.shape is not None


def find_start(
    name_of_field: str,
    name: str | None,
    revision: str | None,
    sources: Sources,
    lora: LlavaModelConfig,
    given: str | None = None,
) -> Start:
    """What a field of a recipe names: a model, an adapter on one, or what an earlier stage will write.

    Args:
        name_of_field: The field.
        name: Hub ID or folder.
        revision: Branch, tag or commit.
        sources: Where to look for what is not there.
        lora: Model fields whose `lora_*` say the shape of an adapter that nothing else says.
        given: The recipe's base of an adapter.

    Returns:
        The start.

    Raises:
        InputError: If nothing is named, or an adapter is none that the plan knows.
        NotFoundError: If it is not there, and neither `--base` nor a recipe beside says what it will be.
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
    base = agreed_base(given, name, adapter.base_model_name_or_path)
    base_folder = _local(f"the base of {name_of_field}", base, adapter.revision, sources.remote)
    return Start(load_config(name_of_field, base_folder, None, sources.remote), base, adapter)


def base_config(model_args: LlavaModelConfig, sources: Sources) -> Start:
    """What `model_name_or_path` names; `--base` where that is not there.

    Args:
        model_args: The recipe's model fields.
        sources: `--base`.

    Returns:
        The start, without an adapter.

    Raises:
        NotFoundError: If neither is there.
    """
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


def recipe_that_writes(name: str, recipe: str | None) -> Earlier | None:
    """The recipe beside a recipe whose run will write a folder, or the checkpoint that it is.

    Args:
        name: The folder.
        recipe: Path of the recipe; None finds nothing.

    Returns:
        The recipe, or None.

    Raises:
        RecipeError: If that recipe cannot be used.
    """
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
            return read_recipe(stage, str(path))
    return None


@lru_cache(maxsize=8)
def read_recipe(stage: str, path: str) -> Earlier:
    """Read another stage's recipe.

    Args:
        stage: sft, reward, ppo or dpo.
        path: The file.

    Returns:
        What it says.

    Raises:
        RecipeError: If it cannot be used.
    """
    parser = make_parser(stage, f"trl-llava plan ({stage})")
    words = ["--config", path]
    values = parser.check(words).values
    parsed = parser.parse([*words, "--use_cpu", "--bf16", "false", "--fp16", "false"])
    return Earlier(path, values, parsed.model_args)


def judged_length(reward_model: str, sources: Sources) -> tuple[int, str] | None:
    """The longest row that a reward model was trained on, which is what it reads of a rollout at most.

    Args:
        reward_model: `reward_model_path`.
        sources: Where recipes may be.

    Returns:
        Its `max_length` and the recipe that says it, the run's own or the one beside the planned one; None if none.
    """
    own = Path(reward_model, "recipe.yaml")
    if own.is_file():
        length = yaml.safe_load(own.read_text(encoding="utf-8")).get("max_length")
        return (length, f"max_length of {own}") if length else None
    earlier = recipe_that_writes(reward_model, sources.recipe)
    if earlier is None or not earlier.values.get("max_length"):
        return None
    return earlier.values["max_length"], f"max_length of {earlier.file}"


def _to_come(
    name_of_field: str, name: str, earlier: Earlier | None, sources: Sources, lora: LlavaModelConfig
) -> Start:
    """What will be written: as the stage's recipe says, or an adapter of this recipe's `lora_*` on `--base`."""
    shape, base = copy.copy(lora), sources.base
    notes = [f"{name} is not there yet: planned for an adapter on {base} (--base), lora_r {shape.lora_r}"]
    shape.use_peft = True
    if earlier is not None:
        shape = copy.copy(earlier.model_args)
        if shape.adapter_name_or_path and not shape.use_peft:
            raise RecipeError(
                f"{name_of_field}: {name} is not there yet, and {earlier.file} goes on with the adapter "
                f"{shape.adapter_name_or_path}: plan that stage first, or give a {name_of_field} that is there."
            )
        base = base or shape.model_name_or_path
        what = f"an adapter of lora_r {shape.lora_r} on {base}" if shape.use_peft else f"a whole model like {base}"
        notes = [f"{name} is not there yet: planned for {what}, as {earlier.file} says"]
    asked = f"{name_of_field} is not there yet; its base"
    revision = shape.model_revision if base == shape.model_name_or_path else None
    folder = _local(asked, base, revision, sources.remote)
    config = load_config(asked, folder, None, sources.remote)
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
