"""Which field of a recipe an error of a library is about: upstream finds many a wrong value where it is first used.

A field is known by its name or its value in the error's message, or by the line of code that the error is from. What
is raised within this package, or tells of no field that was given, may be a fault of ours.
"""

import linecache
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

OF_VALUES = (ValueError, TypeError, LookupError, ArithmeticError, ImportError, OSError, NotImplementedError)
"""What libraries raise for a value that they cannot use."""

_PACKAGE = str(Path(__file__).parents[1])


def about_a_field(error: BaseException, given: Mapping[str, Any]) -> str | None:
    """A library's error in one line that names the field it is about, of those `given`; None if it tells of none."""
    name = _field_of(error, given)
    if name is None:
        return None
    said = " ".join(str(error).split())[:400]
    if mentions(said, name):
        return said
    return f"`{name}: {given[name]!r}` cannot be used ({type(error).__name__}: {said})"


def _field_of(error: BaseException, given: Mapping[str, Any]) -> str | None:
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1][0].startswith(_PACKAGE):
        return None
    for text in (str(error), linecache.getline(*frames[-1])):
        named = [name for name in given if mentions(text, name)]
        if named:
            return max(named, key=len)
    valued = [name for name, value in given.items() if _quotes(str(error), value)]
    return valued[0] if len(valued) == 1 else None


def mentions(text: str, name: str) -> bool:
    """Whether a message or a line of code names a field, which is more than to use its word: `.seed`, `--seed`."""
    word = re.escape(name) if "_" in name else rf"(?:\.|--|[`'\"]){re.escape(name)}"
    return re.search(rf"(?<![A-Za-z0-9_]){word}(?![A-Za-z0-9_])", text) is not None


def _quotes(text: str, value: Any) -> bool:
    """Whether a message quotes a field's value, or a key of it, that would hardly be in it by chance."""
    if isinstance(value, str) and value.startswith("{"):  # JSON, as the command line has mappings
        value = yaml.safe_load(value)
    if isinstance(value, (dict, list)):
        return any(_quotes(text, entry) for entry in value)
    telling = len(value) > 3 if isinstance(value, str) else isinstance(value, (int, float)) and value < 0
    return telling and re.search(rf"(?<![\w.]){re.escape(str(value))}(?!\w|\.\d)", text) is not None
