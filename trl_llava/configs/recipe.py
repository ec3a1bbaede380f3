"""The recipe parser: flat YAML plus `--field value`, into TRL's and our dataclasses, strict about every key and type.

TRL's scripts let an unknown YAML key vanish and hand YAML values to the configs unchecked. Here both are errors that
name the file, the key, what was expected and what was found.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from trl import TrlParser

from trl_llava.configs.recipe_values import RecipeDumper, RecipeLoader, convert, nearest
from trl_llava.errors import RecipeError

LAUNCHER_KEYS = ("accelerate_config", "num_processes", "num_machines", "machine_rank", "mixed_precision", "gpu_ids")
FIELD_GROUPS = {
    "trl_llava": "fields that trl-llava adds or changes",
    "trl": "fields of TRL",
    "transformers": "fields of transformers",
}
SECRETS = frozenset({"hub_token", "token", "use_auth_token", "push_to_hub_token"})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything a run was told, before any dataclass has worked on it.

    Attributes:
        given: What the YAML and the command line say, without secrets.
        defaults: All other fields at their defaults.
    """

    given: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """All fields.

        Returns:
            Field name -> value.
        """
        return {**self.given, **self.defaults}

    def to_yaml(self) -> str:
        """The resolved recipe as a file that `--config` takes.

        Returns:
            YAML: what was given, then every default that the run used.
        """

        def dump(values: dict[str, Any]) -> str:
            return yaml.dump(values, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True) if values else ""

        return (
            "# The resolved recipe of this run; repeat it with --config. Tokens and `env` are never written.\n"
            f"{dump(self.given)}\n# Defaults, as they were when this ran.\n{dump(self.defaults)}"
        )


class RecipeParser(TrlParser):
    """TRL's parser, with errors where TRL's is silent.

    Args:
        dataclass_types: The dataclasses to fill.
        prog: Name of the command in `--help`.
    """

    def __init__(self, dataclass_types: Sequence[type], prog: str | None = None) -> None:
        super().__init__(
            dataclass_types,
            prog=prog,
            usage="%(prog)s --config recipe.yaml [--field value ...]",
            description="Every field below is also a key of the recipe. `--field null` unsets one that can be unset.",
            allow_abbrev=False,
        )
        self._hints: dict[str, Any] = {}
        self._fields: dict[str, dataclasses.Field[Any]] = {}
        for dataclass_type in dataclass_types:
            hints = get_type_hints(dataclass_type)
            fields = {field.name: field for field in dataclasses.fields(dataclass_type) if field.init}
            self._fields.update(fields)
            self._hints.update({name: hints[name] for name in fields})
        if "resume_from_checkpoint" in self._hints:
            self._hints["resume_from_checkpoint"] = bool | str | None  # `true` means the last checkpoint
        for action in self._actions:
            if action.dest in self._fields and action.type is not None and action.default is None:
                action.type = _or_null(action.type)
                action.choices = None if action.choices is None else [*action.choices, None]
                if bool in get_args(self._hints[action.dest]):
                    action.nargs, action.const = "?", True  # `--disable_tqdm`, like every other flag
        self._resolved: dict[str, Any] = {}
        self._group_fields()

    def _group_fields(self) -> None:
        """Lets `--help` show our own fields first, of hundreds."""
        origins = {
            name: base.__module__.partition(".")[0]
            for dataclass_type in self.dataclass_types
            for base in reversed(dataclass_type.__mro__)  # whoever defines a field last
            for name in vars(base).get("__annotations__", ())
        }
        groups = {origin: self.add_argument_group(title) for origin, title in FIELD_GROUPS.items()}
        for action in [action for action in self._optionals._group_actions if action.dest in self._fields]:
            self._optionals._group_actions.remove(action)
            groups[origins[action.dest]]._group_actions.append(action)

    @property
    def field_names(self) -> frozenset[str]:
        """The keys a recipe may have.

        Returns:
            Field names.
        """
        return frozenset(self._fields)

    def parse(self, args: Sequence[str]) -> tuple[Any, ...]:
        """Reads `--config FILE` and the overrides.

        Args:
            args: Command line without the program's name.

        Returns:
            One object per dataclass, then the `Recipe`.

        Raises:
            RecipeError: If a key is unknown, a value has the wrong type, or the fields contradict each other.
        """
        values, recipe, source = self.check(args)
        configs = []
        for dataclass_type in self.dataclass_types:
            names = [field.name for field in dataclasses.fields(dataclass_type) if field.init]
            try:
                configs.append(dataclass_type(**{name: values[name] for name in names}))
            except (ValueError, TypeError) as error:
                raise RecipeError(f"{source}: {error}") from error
            _move_token(configs[-1])
        return (*configs, recipe)

    def check(self, args: Sequence[str]) -> tuple[dict[str, Any], Recipe, str]:
        """Reads `--config FILE` and the overrides without building the dataclasses, which may start CUDA.

        Args:
            args: Command line without the program's name.

        Returns:
            The value of every field, the `Recipe`, and the file or "command line".

        Raises:
            RecipeError: If a key is unknown or a value has the wrong type.
        """
        path, overrides = _split_config(args)
        self.parse_known_args([])
        defaults = self._resolved
        from_file = self._read(path) if path else {}
        if from_file:
            self.set_defaults_with_config(**copy.deepcopy(from_file))
        parsed, unknown = self.parse_known_args(overrides)
        if unknown:
            name = next((arg for arg in unknown if arg.startswith("--")), unknown[0])
            field = name.removeprefix("--").partition("=")[0].replace("-", "_")
            raise RecipeError(f"command line: unknown argument `{name}`{nearest(field, self._fields)}")
        given = {n: v for n, v in self._resolved.items() if n in from_file or v != defaults[n]}
        rest = {n: v for n, v in self._resolved.items() if n not in given}
        return vars(parsed), Recipe(_without_secrets(given), _without_secrets(rest)), path or "command line"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Argparse's method; here it also keeps the values as they are before the dataclasses change them.

        Args:
            args: Command line without the program's name.
            namespace: Object to fill.

        Returns:
            The namespace and the arguments nobody knows.
        """
        parsed, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(parsed).items():
            if value == [None]:
                setattr(parsed, name, None)
        self._resolved = {name: _plain(value) for name, value in vars(parsed).items() if name in self._fields}
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Argparse's way out, without printing 200 options and exiting.

        Args:
            message: What argparse found.

        Raises:
            RecipeError: Always.
        """
        raise RecipeError(f"command line: {message}")

    def _read(self, path: str) -> dict[str, Any]:
        """The keys and values of a recipe, checked; sets what its `env` says, as TRL does."""
        try:
            recipe = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=RecipeLoader)
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}.") from error
        except (yaml.YAMLError, RecipeError) as error:
            raise RecipeError(f"{path}: {error}") from error
        if not isinstance(recipe, dict):
            raise RecipeError(f"{path}: expected a mapping `key: value`, found {type(recipe).__name__}.")
        environment = recipe.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise RecipeError(f"{path}: `env` must be a mapping, found {environment!r}.")
        values = {key: self._check(path, key, value) for key, value in recipe.items()}
        os.environ.update({str(key): str(value) for key, value in environment.items()})
        return values

    def _check(self, path: str, key: Any, value: Any) -> Any:
        if key not in self._fields:
            if key in LAUNCHER_KEYS:
                raise RecipeError(f"{path}: `{key}` belongs to the launcher; give it as --{key} on the command line.")
            raise RecipeError(f"{path}: unknown key `{key}`{nearest(str(key), self._fields)}")
        field = self._fields[key]
        choices = field.metadata.get("choices")
        try:
            value = value if value is None and self.get_default(key) is None else convert(value, self._hints[key])
            if choices and value is not None and value not in choices:
                raise TypeError(f"expected one of {', '.join(map(repr, choices))}, found {value!r}")
        except TypeError as error:
            raise RecipeError(f"{path}: `{key}`: {error}.") from error
        return value


def _split_config(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Takes `--config FILE` or `--config=FILE` out of a command line."""
    path, rest, words = None, [], iter(args)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            found = word.partition("=")[2] if "=" in word else next(words, None)
            if not found:
                raise RecipeError("command line: --config needs the path of a recipe.")
            if path:
                raise RecipeError(f"command line: --config is given twice ({path}, {found}).")
            path = found
        else:
            rest.append(word)
    return path, rest


def _or_null(convert_text: Callable[[str], Any]) -> Callable[[str], Any]:
    """Lets the command line unset a field that a recipe has set."""

    def convert_or_null(text: str) -> Any:
        return None if text in ("null", "None") else convert_text(text)

    convert_or_null.__name__ = getattr(convert_text, "__name__", "value")
    return convert_or_null


def _move_token(config: Any) -> None:
    """Hands a token to huggingface_hub, because the trainer writes its arguments into `training_args.bin`."""
    if getattr(config, "hub_token", None):
        os.environ["HF_TOKEN"] = config.hub_token
        config.hub_token = None


def _plain(value: Any) -> Any:
    """A value as YAML writes it."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return copy.deepcopy(getattr(value, "value", value))


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key not in SECRETS}
    return {key: _without_secrets(value) if isinstance(value, dict) else value for key, value in kept.items()}
