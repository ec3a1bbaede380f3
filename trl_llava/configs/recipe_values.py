"""One recipe value against the type of its field: argparse checks the command line, but never a YAML value.

Also the YAML dialect of recipes: that of TRL (YAML 1.1), except that `1e-4` is a number and a repeated key an error.
"""

import dataclasses
import difflib
import enum
import re
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from trl_llava.errors import RecipeError

_SCIENTIFIC = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class RecipeLoader(yaml.SafeLoader):
    """Reads YAML in which `1e-4` is a number and no key comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Builds one mapping.

        Args:
            node: The parsed mapping.
            deep: Whether nested values are built at once.

        Returns:
            The mapping.

        Raises:
            RecipeError: If a key comes twice; YAML itself would keep the last one.
        """
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                raise RecipeError(
                    f"key `{key_node.value}` is on line {seen[key_node.value]} and again on line {line}."
                )
            seen[key_node.value] = line
        return super().construct_mapping(node, deep=deep)


class RecipeDumper(yaml.SafeDumper):
    """Writes YAML that `RecipeLoader` reads back to equal values."""


for _dialect in (RecipeLoader, RecipeDumper):
    _dialect.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+0123456789"))


def nearest(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant, as the end of an error message.

    Args:
        name: The unknown name.
        known: The names that exist.

    Returns:
        "; did you mean `x`?" or "." if nothing is close.
    """
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{match[0]}`?" if match else "."


def describe(hint: Any) -> str:
    """A type hint in the words of a recipe.

    Args:
        hint: A type hint.

    Returns:
        For example "a number or null".
    """
    if get_origin(hint) in (Union, types.UnionType):
        parts = [describe(part) for part in _without_free_text(get_args(hint))]
        return " or ".join(dict.fromkeys(parts))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each entry {describe(get_args(hint)[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in dataclasses.fields(hint))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(hint, "a mapping" if (get_origin(hint) or hint) is dict else str(hint))


def convert(value: Any, hint: Any) -> Any:
    """Checks a YAML value against a type hint.

    Args:
        value: What the YAML holds.
        hint: The type hint of the field.

    Returns:
        The value as the dataclass takes it: whole numbers become floats where the field is one, a single value becomes
        a list of one where the field is a list (as on the command line).

    Raises:
        TypeError: If the value does not fit; the message says what was expected and found.
    """
    if hint is Any or (hint in (bool, int, str, type(None)) and type(value) is hint):
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        for part in _without_free_text(get_args(hint)):
            try:
                return convert(value, part)
            except TypeError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
            return value
    elif origin is list and value is not None:
        return [convert(entry, get_args(hint)[0]) for entry in (value if isinstance(value, list) else [value])]
    elif origin is dict and isinstance(value, dict):
        return value
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        choices = [member.value for member in hint]
        # YAML 1.1 reads a bare `no` as False, and `eval_strategy: no` is how everybody writes it.
        value = "no" if value is False else value
        if value in choices:
            return value
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _convert_mapping(value, hint)
    raise TypeError(f"expected {describe(hint)}, found {value!r} ({type(value).__name__})")


def _convert_mapping(value: dict[str, Any], dataclass_type: Any) -> dict[str, Any]:
    hints = get_type_hints(dataclass_type)
    required = {field.name for field in dataclasses.fields(dataclass_type) if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(value)):
        raise TypeError(f"`{missing[0]}` is missing in {value!r}")
    for key, entry in value.items():
        if key not in hints:
            raise TypeError(f"unknown key `{key}`{nearest(key, hints)}")
        try:
            value = {**value, key: convert(entry, hints[key])}
        except TypeError as error:
            raise TypeError(f"`{key}`: {error}") from error
    return value


def _without_free_text(parts: tuple[Any, ...]) -> list[Any]:
    """The members of a union, without `str` where an enum is among them: upstream accepts only the enum's values."""
    has_enum = any(isinstance(part, type) and issubclass(part, enum.Enum) for part in parts)
    return [part for part in parts if not (has_enum and part is str)]
