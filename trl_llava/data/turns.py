"""Which turns a row may have: every one says or shows something, speakers alternate, and completions differ."""

import unicodedata
from typing import Any

from trl_llava.data.contract import COMPLETIONS, RowError, Stage, abridged, count_images
from trl_llava.prompts import Message, message_text

LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_OTHER_MARKS = ("<video>", "<audio>")


def check_turns(row: dict[str, Any], stage: Stage, record: dict[str, Any]) -> None:
    """Refuse rows without a prompt or a completion, with turns that no template was trained on, or no choice."""
    row_name, prompt = row["row_name"], row["prompt"]
    if not prompt or prompt[-1]["role"] != "user":
        problem = f"its prompt ends with {prompt[-1]['role'] if prompt else 'nothing'}, expected a user turn"
        raise RowError(row_name, problem, "Correct the turns", "no question")
    for i, message in enumerate(prompt):
        _check_order(row, i, record)
        _check_content(message, row_name, _turn_name(row, i, record), last=i == len(prompt) - 1)
    for name in COMPLETIONS[stage]:
        (completion,) = row[name]
        if completion["role"] != "assistant":
            problem = f"{name} is a {completion['role']} turn, expected an assistant turn"
            raise RowError(row_name, problem, "Correct the turns", f"{name} is no assistant turn")
        if count_images([completion]):
            raise RowError(row_name, f"{name} shows an image", "Show images in user turns", "image in a completion")
        # An empty rejected completion is a lesson: say something.
        if name != "rejected" and not _said(completion):
            raise RowError(row_name, f"its {name} is empty", "Leave the row out", f"empty {name}")
    if stage == "preference" and message_text(row["chosen"][0]).strip() == message_text(row["rejected"][0]).strip():
        problem = f"chosen and rejected are the same: {abridged(message_text(row['chosen'][0]))}"
        raise RowError(row_name, problem, "Leave the row out: there is nothing to prefer", "chosen equal to rejected")


def _check_order(row: dict[str, Any], i: int, record: dict[str, Any]) -> None:
    """Refuse turn `i` of a prompt unless user and assistant alternate from the user on, after a system message."""
    roles = [message["role"] for message in row["prompt"][: i + 1]]
    before = roles[i - 1] if i else None
    expected = "user" if before in (None, "system", "assistant") else "assistant"
    if roles[i] == expected or (i == 0 and roles[i] == "system"):
        return
    where = f"after {before}" if before else "at the beginning"
    problem = f"{_turn_name(row, i, record)} has the role {roles[i]} {where}, expected {expected}"
    raise RowError(
        row["row_name"], problem, "Join the turns of one speaker, or leave the row out", "turns out of order"
    )


def _check_content(message: Message, row_name: str, where: str, *, last: bool) -> None:
    """Refuse a user's or assistant's turn that says and shows nothing, or shows what no model here takes."""
    text = _said(message)
    marks = [mark for mark in _OTHER_MARKS if text.startswith(mark) or text.endswith(mark)]
    if message["role"] == "user" and marks:
        problem = f"{where} shows {marks[0]}, which is not supported"
        raise RowError(row_name, problem, "Leave the row out", f"{marks[0]} not supported")
    if message["role"] == "system" or text or count_images([message]):
        return
    if message["role"] == "user":
        problem = f"its question has neither text nor an image ({where})"
        raise RowError(row_name, problem, "Leave the row out", "no question" if last else "empty question")
    raise RowError(row_name, f"its earlier completion is empty ({where})", "Leave the row out", "empty completion")


def _said(message: Message) -> str:
    """The text of a turn without what nobody sees: white space around it, characters without width."""
    return "".join(c for c in message_text(message) if unicodedata.category(c) != "Cf").strip()


def _turn_name(row: dict[str, Any], i: int, record: dict[str, Any]) -> str:
    """What the record calls turn `i` of a row's prompt: `conversations[1]`."""
    i -= bool(record.get("system"))
    column = next((name for name in ("conversations", "messages", "prompt") if record.get(name) is not None), "chosen")
    turns = record[column]
    if isinstance(turns, str):
        turns = [turns]
    if column == "conversations":  # turns of the assistant before the first question were left out
        i += next((n for n, turn in enumerate(turns) if LLAVA_ROLES[turn["from"]] != "assistant"), 0)
    if column == "prompt" and i >= len(turns):
        column, i = "completion", i - len(turns)
    return f"{column}[{i}]"
