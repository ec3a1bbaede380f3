"""A Hub ID with its revision, `org/name@v1`, taken apart: the one place that does."""

import re
from pathlib import Path
from typing import Any

from trl_llava.errors import InputError

_WITH_REVISION = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)*)@(?P<revision>[^@\s]+)")


def split_revision(field: str, name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Take `@revision` off a Hub ID; a path that exists, or begins like one, keeps its `@`.

    `revision` is the one that a field of its own names: two that differ are an `InputError`.

    >>> split_revision("model_name_or_path", "org/name@v1")
    ('org/name', 'v1')
    """
    match = _WITH_REVISION.fullmatch(name)
    if match is None or name.startswith((".", "~")) or Path(name).exists():
        return name, revision
    found = match["revision"]
    if revision is not None and revision != found:
        raise InputError(
            f"{field}: '{name}' names the revision {found!r}, and its revision field {revision!r}. Leave one of them "
            "out"
        )
    return match["name"], found


def split_fields(config: Any, **revisions: str) -> None:
    """Move `@revision` from the fields of a config that hold Hub IDs to those that hold revisions (field=field)."""
    for field, other in revisions.items():
        name, revision = getattr(config, field), getattr(config, other)
        if name is None:
            continue
        # "main" is TRL's default and gives way.
        name, found = split_revision(f"`{field}`", name, None if revision == "main" else revision)
        setattr(config, field, name)
        if found is not None:
            setattr(config, other, found)
