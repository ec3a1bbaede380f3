"""The recipe parser: TRL's, plus a check of every key and type of the YAML, and errors of one line.

TRL's parser converts the words of a command line, but hands YAML values to the configs as they are.
"""

import argparse
import copy
import dataclasses
import difflib
import enum
import importlib
import os
import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, TrlParser

from trl_llava.configs.combinations import check_combinations
from trl_llava.configs.faulty_field import OF_VALUES, mentions
from trl_llava.configs.shipped import find_shipped
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments
from trl_llava.errors import RecipeError

STAGES = {
    "sft": "trl_llava.configs.sft:LlavaSFTConfig",
    "reward": "trl_llava.configs.reward:LlavaRewardConfig",
    "dpo": "trl_llava.configs.dpo:LlavaDPOConfig",
    "ppo": "trl_llava.configs.ppo:LlavaPPOConfig",
    "grpo": "trl_llava.configs.grpo:LlavaGRPOConfig",
    "rloo": "trl_llava.configs.rloo:LlavaRLOOConfig",
}
"""The training config of each stage; imported only for that stage, so that none depends on another one's upstream."""
LAUNCHER_KEYS = ("accelerate_config", "num_processes", "num_machines", "machine_rank", "mixed_precision", "gpu_ids")
FIELD_GROUPS = {
    "trl_llava": "fields that trl-llava adds or changes",
    "trl": "fields of TRL",
    "transformers": "fields of transformers",
}
DEFAULTS_HEADING = "# Defaults, as they were when this ran."
SECRETS = frozenset({"hub_token", "token", "use_auth_token", "push_to_hub_token"})


class RecipeLoader(yaml.SafeLoader):
    """YAML as TRL reads it, except that `1e-4` is a number and a repeated key an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """One mapping; YAML itself would keep the last of two equal keys."""
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if lines.setdefault(key.value, line) != line:
                raise RecipeError(f"key `{key.value}` is on line {lines[key.value]} and again on line {line}.")
        return super().construct_mapping(node, deep=deep)


class RecipeDumper(yaml.SafeDumper):
    """Writes YAML that `RecipeLoader` reads back to equal values."""


for _dialect in (RecipeLoader, RecipeDumper):
    _number = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    _dialect.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+0123456789"))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All fields of a run but secrets, as they were before any dataclass changed them: those given, and the rest."""

    given: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """All fields by name."""
        return {**self.given, **self.defaults}

    def to_yaml(self) -> str:
        """The resolved recipe as a file that `--config` reads: what was given, then the defaults that the run used."""

        def dump(values: dict[str, Any]) -> str:
            # What a run was resumed from is no part of it: the recipe repeats it from its start.
            kept = {name: value for name, value in values.items() if name != "resume_from_checkpoint"}
            return yaml.dump(kept, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True) if kept else ""

        return (
            "# The resolved recipe of this run; repeat it with --config. Tokens and `env` are never written.\n"
            f"{dump(self.given)}\n{DEFAULTS_HEADING}\n{dump(self.defaults)}"
        )


class ParsedRecipe(NamedTuple):
    """A recipe and its overrides as the objects that TRL's scripts work with."""

    script_args: LlavaScriptArguments
    training_args: Any  # the config of the stage, see STAGES
    model_args: LlavaModelConfig
    mixture: DatasetMixtureConfig
    recipe: Recipe


def make_parser(stage: str, prog: str | None = None) -> "RecipeParser":
    """The parser of a stage's recipes; `prog` is the name of the command in `--help`."""
    return RecipeParser(stage, _dataclasses(stage), prog or f"train_{stage}")


class RecipeParser(TrlParser):
    """TRL's parser for a stage's dataclasses; wrong keys and values are a `RecipeError` that names them."""

    def __init__(self, stage: str, dataclass_types: Sequence[type], prog: str) -> None:
        super().__init__(
            dataclass_types,
            prog=prog,
            usage="%(prog)s --config recipe.yaml [--field value ...]",
            description="Every field below is also a key of the recipe. `--field null` unsets one that can be unset.",
            allow_abbrev=False,
        )
        self.add_argument("--config", metavar="FILE", help="the recipe")
        self.stage = stage
        self._hints: dict[str, Any] = {}
        for kind in dataclass_types:
            hints = get_type_hints(kind)
            for name, choices in ((field.name, field.metadata.get("choices", ())) for field in _fields(kind)):
                self._hints[name] = _strict(hints[name], choices, self.get_default(name))
        self._hints["resume_from_checkpoint"] = bool | str | None  # `true` means the last checkpoint
        self._hints["datasets"] = list[dict[str, Any]]  # TRL's mixture makes a DatasetConfig of each
        for action in self._actions:
            if action.default is None and bool in get_args(self._hints.get(action.dest)):
                action.nargs, action.const = "?", True  # `--disable_tqdm` alone, like every other flag
            elif {str, list[str]} <= set(_parts(self._hints.get(action.dest))):
                action.nargs = "+"  # `--report_to wandb tensorboard`
            elif action.option_strings[0].startswith("--no_"):
                action.help = f"The same as `--{action.dest} false`."
        self.field_names = frozenset(self._hints)
        self._group_fields()

    def _group_fields(self) -> None:
        """Lets `--help` show our own fields first, of hundreds."""
        origins = {
            name: base.__module__.partition(".")[0]
            for kind in self.dataclass_types
            for base in reversed(kind.__mro__)  # whoever defines a field last
            for name in vars(base).get("__annotations__", ())
        }
        groups = {origin: self.add_argument_group(title) for origin, title in FIELD_GROUPS.items()}
        for action in [action for action in self._optionals._group_actions if action.dest in self._hints]:
            self._optionals._group_actions.remove(action)
            groups[origins[action.dest]]._group_actions.append(action)

    def parse(self, args: Sequence[str]) -> ParsedRecipe:
        """Reads `--config FILE` and the overrides, into the dataclasses and the `Recipe`."""
        values, recipe, source = self._read(args)
        configs = [_build(kind, values, source) for kind in self.dataclass_types]
        parsed = ParsedRecipe._make([*configs, recipe])
        if token := parsed.training_args.hub_token:
            os.environ["HF_TOKEN"] = token  # the trainer writes its arguments into `training_args.bin`
            parsed.training_args.hub_token = None
        return parsed

    def check(self, args: Sequence[str]) -> Recipe:
        """Checks what `parse` does as far as it goes without the training config, which may start CUDA."""
        values, recipe, source = self._read(args)
        for kind in self.dataclass_types:
            if not issubclass(kind, TrainingArguments):
                _build(kind, values, source)
        return recipe

    def error(self, message: str) -> NoReturn:
        """Argparse's way out, without printing 300 options and exiting."""
        raise RecipeError(f"command line: {message}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if arg_strings in (["null"], ["None"]) and type(None) in get_args(self._hints.get(action.dest)):
            return None  # argparse has no other place where a list or one of several choices can be unset
        values = super()._get_values(action, arg_strings)
        several = str in _parts(self._hints.get(action.dest)) and isinstance(values, list) and len(values) == 1
        return values[0] if several else values  # where a text may stand for a list of one, as a recipe has it

    def _read(self, args: Sequence[str]) -> tuple[dict[str, Any], Recipe, str]:
        """The value of every field, the recipe, and where they come from for error messages."""
        defaults = {name: _plain(value) for name, value in vars(self.parse_known_args([])[0]).items()}
        path = self.parse_known_args(args)[0].config
        from_file = self._from_file(path) if path else {}
        self.set_defaults_with_config(**copy.deepcopy(from_file))
        namespace, unknown = self.parse_known_args(args)
        if unknown:
            name = next((word for word in unknown if word.startswith("--")), unknown[0])
            field = name.removeprefix("--").partition("=")[0].replace("-", "_")
            raise RecipeError(f"command line: unknown argument `{name}`{nearest(field, self._hints)}")
        values = {name: expand_home(value) for name, value in vars(namespace).items() if name in self._hints}
        check_combinations(values, path or "command line")
        plain = {name: _plain(value) for name, value in values.items() if name not in SECRETS}
        given = {name: value for name, value in plain.items() if name in from_file or value != defaults[name]}
        rest = {name: value for name, value in plain.items() if name not in given}
        return values, Recipe(given, rest), path or "command line"

    def _from_file(self, path: str) -> dict[str, Any]:
        """The checked fields of a recipe; sets what its `env` says, as TRL does."""
        recipe = read_recipe(path)
        environment = recipe.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise RecipeError(f"{path}: `env` must be a mapping, found {environment!r}.")
        for key, value in recipe.items():
            if key not in self._hints:
                raise RecipeError(f"{path}: {self._unknown(str(key), recipe, path)}")
            recipe[key] = _checked(f"{path}: `{key}`", value, self._hints[key])
        os.environ.update({str(key): str(value) for key, value in environment.items()})
        return recipe

    def _unknown(self, key: str, recipe: dict[str, Any], path: str) -> str:
        if key in LAUNCHER_KEYS:
            return f"`{key}` belongs to the launcher; give it as --{key} on the command line."
        fitting = stages_with(recipe)
        if not fitting and (named := stage_in_name(path)) not in (None, self.stage) and key in _known(str(named)):
            fitting = [str(named)]
        if fitting:
            return f"this is a recipe for {' or '.join(fitting)}, not for {self.stage}, which has no field `{key}`."
        return f"unknown key `{key}`{nearest(key, self._hints)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant, as the end of an error message."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{match[0]}`?" if match else "."


def _dataclasses(stage: str) -> tuple[type, ...]:
    module, _, name = STAGES[stage].partition(":")
    config = getattr(importlib.import_module(module), name)
    return LlavaScriptArguments, config, LlavaModelConfig, DatasetMixtureConfig


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.init]


def stages_with(keys: Iterable[str]) -> list[str]:
    """The stages that have all these fields; none whose upstream this TRL does not have."""
    return [stage for stage in STAGES if set(keys) <= {*_known(stage), "env"}]


def stage_in_name(path: str) -> str | None:
    """The stage that is the first word of a recipe's file name, as in `ppo_no_length.yaml`."""
    first = Path(path).name.partition(".")[0].partition("_")[0]
    return first if first in STAGES else None


def _known(stage: str) -> set[str]:
    """The fields of a stage; none of one whose upstream this TRL does not have."""
    try:
        return {field.name for kind in _dataclasses(stage) for field in _fields(kind)}
    except ImportError:
        return set()


def read_recipe(path: str) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    try:
        recipe = yaml.load(find_shipped(path).read_text(encoding="utf-8"), Loader=RecipeLoader)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no recipe: it is not text in UTF-8.") from error
    except (yaml.YAMLError, RecipeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path}: expected a mapping `key: value`, found {type(recipe).__name__}.")
    return recipe


def expand_home(value: Any) -> Any:
    """A value with `~/` as the home directory, also within lists and mappings: the shell expands it in few places."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~/") else value
    if isinstance(value, list):
        return [expand_home(entry) for entry in value]
    return {key: expand_home(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def _build(kind: Any, values: dict[str, Any], source: str) -> Any:
    fields = _fields(kind)
    given = {field.name: values[field.name] for field in fields}
    try:
        return kind(**given)
    except OF_VALUES as error:
        said = " ".join(str(error).split())
        changed = {field.name: field.default for field in fields if given[field.name] != field.default}
        if not any(mentions(said, name) for name in changed):
            for name, default in changed.items():
                if _can_build(kind, {**given, name: default}):
                    said = f"`{name}: {given[name]!r}` cannot be used ({said})"
                    break
        raise RecipeError(f"{source}: {said}") from error


def _can_build(kind: Any, values: dict[str, Any]) -> bool:
    try:
        kind(**values)
    except OF_VALUES:
        return False
    return True


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union; any other type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _strict(hint: Any, choices: Sequence[Any], default: Any) -> Any:
    """A field's type with the values that it may have, where upstream also allows free text, and None as a default."""
    for members in (part for part in _parts(hint) if isinstance(part, enum.EnumMeta)):
        choices = [member.value for member in members]  # type: ignore[var-annotated]
    strict = Literal[tuple(choices)] if choices else hint
    return strict | None if default is None or type(None) in _parts(hint) else strict


def _checked(where: str, value: Any, hint: Any) -> Any:
    """A YAML value as a field of this type takes it."""
    converted = _converted(value, hint)
    try:
        type_validator("", converted, hint)
    except TypeError as error:
        raise RecipeError(f"{where}: expected {_name(hint)}, found {value!r} ({type(value).__name__}).") from error
    return converted


def _converted(value: Any, hint: Any) -> Any:
    """A YAML value as the command line would give it: 1 as a number, a single value as a list of one."""
    parts = _parts(hint)
    entries = [get_args(part)[0] for part in parts if get_origin(part) is list]
    if type(value) is int and float in parts and int not in parts:
        return float(value)
    if value is False and any("no" in get_args(part) for part in parts):
        return "no"  # YAML 1.1 reads a bare `no` as False, and `eval_strategy: no` is how everybody writes it
    if entries and value is not None and str not in parts:
        value = [_converted(entry, entries[0]) for entry in (value if isinstance(value, list) else [value])]
    if isinstance(value, list) and any(get_origin(part) is tuple for part in parts):
        return tuple(value)
    return value


def _name(hint: Any) -> str:
    """A type in the words of a recipe: `float or null`."""
    if len(parts := _parts(hint)) > 1:
        return " or ".join(map(_name, parts))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return "null" if hint is type(None) else str(hint) if get_args(hint) else hint.__name__


def _plain(value: Any) -> Any:
    """A value as YAML writes it, without secrets inside mappings."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if key not in SECRETS}
    return copy.deepcopy(getattr(value, "value", value))
