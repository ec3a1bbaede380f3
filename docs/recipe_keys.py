"""Puts every key of every stage into recipes.md, read from the configs: called by mkdocs for each page."""

import argparse
from typing import Any

from trl_llava.configs.recipe import FIELD_GROUPS, STAGES, make_parser

MARK = "<!-- keys -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the tables of keys in the place of the mark."""
    return markdown.replace(MARK, tables()) if MARK in markdown else markdown


def tables() -> str:
    """One section for each stage: our fields open, TRL's and transformers' folded, where no earlier stage has them."""
    shown: set[tuple[str, str]] = set()
    sections = []
    for stage in STAGES:
        sections.append(f"### {stage}\n")
        for group in groups(stage):
            fields = [action for action in group._group_actions if f"--{action.dest}" in action.option_strings]
            rows = [(action.dest, _row(action)) for action in fields]
            new = [row for row in rows if row not in shown]
            shown |= set(rows)
            if not new:
                continue
            some = "" if len(new) == len(rows) else f", and {len(rows) - len(new)} of earlier stages"
            table = "\n".join(["| key | default | |", "|---|---|---|", *(row for _, row in sorted(new))])
            if group.title == FIELD_GROUPS["trl_llava"]:
                sections.append(f"{len(new)} {group.title}{some}:\n\n{table}\n")
            else:
                sections.append(
                    f"<details markdown><summary>{len(new)} {group.title}{some}</summary>\n\n{table}\n\n</details>\n"
                )
    return "\n".join(sections)


def groups(stage: str) -> list[Any]:
    """The groups of fields in the order of `--help`."""
    return [group for group in make_parser(stage)._action_groups if group.title in FIELD_GROUPS.values()]


def _row(action: argparse.Action) -> str:
    default = "" if action.default in (None, "") else f"`{action.default}`"
    text = " ".join(str(action.help).replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")
    return f"| `{action.dest}` | {default} | {text} |"
