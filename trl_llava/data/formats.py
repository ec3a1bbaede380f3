"""Published formats to rows: TRL's conversational formats and LLaVA's JSON, one record at a time."""

import sys
from typing import Any

from trl_llava.data.contract import (
    ANSWER_TYPES,
    COMPLETIONS,
    RowError,
    Stage,
    abridged,
    count_images,
    normalise_messages,
    place_images,
)
from trl_llava.prompts import Message, message_text

LLAVA_IMAGE_MARK = "<image>"
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
LLAVA_CAPTION_TYPES = {1: "general", 2: "A", 3: "B", 4: "C", 5: "D", 6: "no", 7: "yes"}

_COLUMNS = "row_name images image messages conversations prompt completion chosen rejected output_1 output_2"
_COLUMNS += " preference margin captions answer_type caption_type length_multiplier length_bonus system"
KNOWN_COLUMNS = frozenset(_COLUMNS.split())
"""Columns that mean something here; any other one is carried along (prompt stage) or left behind, with a warning."""

UNSUPPORTED_COLUMNS = {
    **dict.fromkeys(("video", "videos"), "a video, which is not supported"),
    **dict.fromkeys(("audio", "audios"), "audio, which is not supported"),
    "tools": "tools, which are not supported",
    **dict.fromkeys(("chosen_images", "rejected_images"), "images of one completion: both of a pair see the same"),
}
"""Columns of content that no stage reads: a row that has some would teach another thing without it."""


def to_row(record: dict[str, Any], stage: Stage, row_name: str) -> dict[str, Any]:
    """Turn one record into a row of the contract; its images stay as the record has them.

    - TRL: `messages`; `prompt` with `completion`, or with `chosen` and `rejected`; `chosen` and `rejected` that begin
      with the same prompt. Images go to the front of the first user turn unless image parts place them.
    - LLaVA JSON: `conversations` with `from` (human, gpt) and `value`; `<image>` is moved to the front of its turn and
      the rest stripped; turns of the assistant before the first question are left out. Preferences have `output_1`,
      `output_2` and `preference`; the placeholder that ends their conversation goes. Of a PPO record the first
      question is the prompt, as in the paper.

    A `system` column becomes the system message. `margin` is there only where the record has one.
    """
    for name in UNSUPPORTED_COLUMNS:
        if record.get(name):
            problem = f"its column {name} has {UNSUPPORTED_COLUMNS[name]}"
            raise RowError(row_name, problem, "Leave the row out, or drop the column", f"{name} not supported")
    images = _images(record, row_name)
    messages = _llava_messages if record.get("conversations") is not None else _trl_messages
    row: dict[str, Any] = {"row_name": row_name, "images": images, **messages(record, stage, row_name, len(images))}
    if record.get("system"):
        row["prompt"] = [_system_message(record["system"], row["prompt"], row_name), *row["prompt"]]
    _check_turns(row, stage, record)
    if stage != "sft":
        row["captions"] = _captions(record, row_name)
    if stage == "preference" and record.get("margin") is not None:
        row["margin"] = _number(record["margin"], "margin", row_name)
    if stage == "prompt":
        row["answer_type"] = _answer_type(record, row_name)
        given = [record[name] for name in ("length_multiplier", "length_bonus") if record.get(name) is not None]
        row["length_multiplier"] = _number(given[0], "length_multiplier", row_name) if given else 1.0
    return row


def _system_message(text: Any, prompt: list[Message], row_name: str) -> Message:
    if not isinstance(text, str):
        raise RowError(
            row_name, f"system is {abridged(text)}, expected a text", "Correct the row", "system is no text"
        )
    if prompt and prompt[0]["role"] == "system":
        problem = "it has a system column and a system message"
        raise RowError(row_name, problem, "Keep one of them", "two system messages")
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def _images(record: dict[str, Any], row_name: str) -> list[Any]:
    given = [name for name in ("images", "image") if record.get(name)]
    if len(given) > 1:
        raise RowError(row_name, f"it has {' and '.join(given)}", "Keep one of them", "several image columns")
    value = record[given[0]] if given else []
    images = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(image is None for image in images):
        raise RowError(row_name, "its images have a gap (None)", "Remove the gap", "image missing")
    return images


def _trl_messages(record: dict[str, Any], stage: Stage, row_name: str, images: int) -> dict[str, list[Message]]:
    found = {
        name: normalise_messages(record[name], row_name, name)
        for name in ("messages", "prompt", "completion", "chosen", "rejected")
        if record.get(name) is not None
    }
    if stage == "preference":
        _require(found, ("chosen", "rejected"), record, row_name)
        prompt, chosen, rejected = _split_pair(found, row_name)
        return {"prompt": place_images(prompt, images, row_name), "chosen": chosen, "rejected": rejected}
    if "messages" in found:
        conversation = found["messages"]
        if stage == "prompt" and conversation and conversation[-1]["role"] == "assistant":
            conversation = conversation[:-1]
    else:
        _require(found, ("prompt", "completion") if stage == "sft" else ("prompt",), record, row_name)
        conversation = found["prompt"] + (found["completion"] if stage == "sft" else [])
    if stage == "prompt":
        return {"prompt": place_images(conversation, images, row_name)}
    return {"prompt": place_images(conversation[:-1], images, row_name), "completion": conversation[-1:]}


def _split_pair(found: dict[str, list[Message]], row_name: str) -> tuple[list[Message], list[Message], list[Message]]:
    chosen, rejected = found["chosen"], found["rejected"]
    if "prompt" not in found:
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
            problem = "it has no prompt, and chosen and rejected differ before their last message"
            fix = "Add a `prompt` column, or give both the same messages before the last"
            raise RowError(row_name, problem, fix, "no common prompt")
        return chosen[:-1], chosen[-1:], rejected[-1:]
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if len(completion) != 1:
            problem, fix = f"{name} has {len(completion)} messages, expected one", "Move those before it to `prompt`"
            raise RowError(row_name, problem, fix, f"{name} is not one message")
    return found["prompt"], chosen, rejected


def _llava_messages(record: dict[str, Any], stage: Stage, row_name: str, images: int) -> dict[str, list[Message]]:
    turns = record["conversations"]
    if not isinstance(turns, (list, tuple)):
        raise RowError(row_name, f"conversations is {abridged(turns)}, expected a list of turns", "Correct the row")
    conversation = [_llava_turn(turn, row_name, f"conversations[{i}]") for i, turn in enumerate(turns)]
    while conversation and conversation[0]["role"] == "assistant":
        conversation = conversation[1:]
    shown = count_images(conversation)
    if shown != images:
        problem = f"its human turns have {shown} {LLAVA_IMAGE_MARK}, but it has {images} image{'s' * (images != 1)}"
        reason = f"{LLAVA_IMAGE_MARK} count unlike the number of images"
        raise RowError(row_name, problem, f"Write {LLAVA_IMAGE_MARK} once for each image", reason)
    if stage == "prompt":
        first = next((i for i, message in enumerate(conversation) if message["role"] == "user"), -1)
        return {"prompt": place_images(conversation[: first + 1], images, row_name)}
    if stage == "sft":
        return {"prompt": conversation[:-1], "completion": conversation[-1:]}
    _require(record, ("output_1", "output_2", "preference"), record, row_name)
    outputs = [_llava_turn(record[name], row_name, name) for name in ("output_1", "output_2")]
    preference = record["preference"]
    if type(preference) is not int or preference not in (1, 2):
        problem = f"preference is {preference!r}, expected 1 or 2"
        raise RowError(row_name, problem, "Correct the row", "preference outside {1, 2}")
    if conversation and conversation[-1]["role"] == "assistant":
        conversation = conversation[:-1]
    return {"prompt": conversation, "chosen": [outputs[preference - 1]], "rejected": [outputs[2 - preference]]}


def _llava_turn(turn: Any, row_name: str, where: str) -> Message:
    speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if speaker not in LLAVA_ROLES or not isinstance(value, str):
        problem = f"{where} is {abridged(turn)}, expected `from` (human or gpt) and a text `value`"
        raise RowError(row_name, problem, "Correct the turn", "turn without speaker or text")
    marks = value.count(LLAVA_IMAGE_MARK) if speaker == "human" else 0
    content: list[dict[str, Any]] = [{"type": "image", "text": None} for _ in range(marks)]
    text = value.replace(LLAVA_IMAGE_MARK, "").strip() if marks else value
    if text or not marks:
        content.append({"type": "text", "text": text})
    return {"role": LLAVA_ROLES[speaker], "content": content}


def _check_turns(row: dict[str, Any], stage: Stage, record: dict[str, Any]) -> None:
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
        if name != "rejected" and not message_text(completion).strip():
            raise RowError(row_name, f"its {name} is empty", "Leave the row out", f"empty {name}")
    if stage == "preference" and message_text(row["chosen"][0]) == message_text(row["rejected"][0]):
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
    """Refuse a user's or assistant's turn that says and shows nothing."""
    if message["role"] == "system" or message_text(message).strip() or count_images([message]):
        return
    if message["role"] == "user":
        problem = f"its question has neither text nor an image ({where})"
        raise RowError(row_name, problem, "Leave the row out", "no question" if last else "empty question")
    raise RowError(row_name, f"its earlier completion is empty ({where})", "Leave the row out", "empty completion")


def _turn_name(row: dict[str, Any], i: int, record: dict[str, Any]) -> str:
    """What the record calls turn `i` of a row's prompt: `conversations[1]`."""
    i -= bool(record.get("system"))
    column = next((name for name in ("conversations", "messages", "prompt") if record.get(name) is not None), "chosen")
    turns = record[column]
    if column == "conversations":  # turns of the assistant before the first question were left out
        i += next((n for n, turn in enumerate(turns) if LLAVA_ROLES[turn["from"]] != "assistant"), 0)
    if column == "prompt" and i >= len(turns):
        column, i = "completion", i - len(turns)
    return f"{column}[{i}]"


def _captions(record: dict[str, Any], row_name: str) -> list[str]:
    captions = record.get("captions")
    if captions is None:
        return []
    if not isinstance(captions, (list, tuple)) or not all(isinstance(c, str) and c.strip() for c in captions):
        problem = f"captions is {abridged(captions)}, expected a list of texts"
        raise RowError(row_name, problem, "Correct the row", "captions are no list of texts")
    return list(captions)


def _answer_type(record: dict[str, Any], row_name: str) -> str:
    named, numbered = record.get("answer_type"), record.get("caption_type")
    if named is None and numbered is None:
        return "general"
    if named is not None:
        kind = named if named in ANSWER_TYPES else None
        problem = f"answer_type is {named!r}, expected one of {', '.join(ANSWER_TYPES)}"
    else:
        kind = LLAVA_CAPTION_TYPES.get(numbered) if type(numbered) is int else None
        problem = f"caption_type is {numbered!r}, expected one of {LLAVA_CAPTION_TYPES}"
    if kind is None:
        raise RowError(row_name, problem, "Correct the row", "unknown answer type")
    return kind


def _number(value: Any, column: str, row_name: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:  # an integer may have any number of digits
        problem = f"{column} is {abridged(value)}, expected a finite number"
        raise RowError(row_name, problem, "Correct the row", f"{column} is no number")
    return float(value)


def _require(found: dict[str, Any], columns: tuple[str, ...], record: dict[str, Any], row_name: str) -> None:
    missing = [name for name in columns if found.get(name) is None]
    if missing:
        present = sorted(name for name, value in record.items() if value is not None)
        raise RowError(
            row_name,
            f"it has no {' and no '.join(missing)}; found the columns {present}",
            "Expected TRL's columns (`messages`; `prompt` and `completion`; `chosen` and `rejected`) or LLaVA's "
            "(`conversations`; `output_1`, `output_2` and `preference`)",
            f"{missing[0]} missing",
        )
