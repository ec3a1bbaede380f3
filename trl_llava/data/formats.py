"""Published formats to rows: TRL's conversational formats and LLaVA's JSON, one record at a time."""

import sys
from typing import Any

from trl_llava.data.contract import (
    ANSWER_TYPES,
    IMAGE_MARK,
    TIE,
    RowError,
    Stage,
    abridged,
    count_images,
    marked_parts,
    normalise_messages,
    place_images,
)
from trl_llava.data.layouts import RATED, best_and_worst, read_layout
from trl_llava.data.turns import LLAVA_ROLES, check_turns
from trl_llava.data.unread import refuse_other_images, refuse_unread
from trl_llava.prompts import Message

LLAVA_CAPTION_TYPES = {1: "general", 2: "A", 3: "B", 4: "C", 5: "D", 6: "no", 7: "yes"}

_COLUMNS = "row_name images image messages conversations prompt completion chosen rejected output_1 output_2"
_COLUMNS += " preference margin captions answer_type caption_type length_multiplier length_bonus system"
KNOWN_COLUMNS = frozenset(_COLUMNS.split())
"""Columns that mean something in any layout; others are carried along (prompt stage) or left behind and named."""


def to_row(
    record: dict[str, Any],
    stage: Stage,
    row_name: str,
    *,
    captions_column: str = "captions",
    rating: str | None = None,
) -> dict[str, Any]:
    """Turn one record into a row of the contract; its images stay as the record has them.

    - TRL: `messages`; `prompt` with `completion`, or with `chosen` and `rejected`; `chosen` and `rejected` that begin
      with the same prompt; texts instead of messages. Images stand where image parts are, or `<image>` in a user's
      text, else at the front of the first user turn.
    - LLaVA JSON: `conversations` with `from` (human, gpt) and `value`, `<image>` in human turns; turns of the
      assistant before the first question are left out. Preferences have `output_1`, `output_2` and `preference`, or
      `chosen` and `rejected`; the placeholder that ends their conversation goes. Of a PPO record the first question is
      the prompt, as in the paper.
    - Other layouts of the Hub: `layouts.LAYOUTS`.

    Of a pair the prompt stage reads the prompt and SFT the chosen completion too. A `system` column becomes the system
    message. `margin` is there only where the record has one.
    """
    refuse_unread(record, stage, row_name)
    record = read_layout(record, row_name)
    images = _images(record, row_name)
    if not images:
        refuse_other_images(record, KNOWN_COLUMNS, row_name)
    if RATED in record and stage != "prompt":
        record = {**record, **_rated_pair(record, stage, row_name, rating)}
    messages = _llava_messages if record.get("conversations") is not None else _trl_messages
    row: dict[str, Any] = {"row_name": row_name, "images": images, **messages(record, stage, row_name, len(images))}
    if record.get("system"):
        row["prompt"] = [_system_message(record["system"], row["prompt"], row_name), *row["prompt"]]
    check_turns(row, stage, record)
    if stage != "sft":
        row["captions"] = _captions(record, row_name, captions_column)
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


def _rated_pair(record: dict[str, Any], stage: Stage, row_name: str, rating: str | None) -> dict[str, str]:
    best, worst, level = best_and_worst(record[RATED], rating, row_name)
    if level and stage == "preference":
        raise RowError(row_name, "its completions have equal ratings", "Leave the row out", TIE)
    return {"chosen": best, "rejected": worst}


def _messages(value: Any, row_name: str, column: str) -> list[Message]:
    """The messages of one of TRL's columns, which may hold a text instead."""
    if isinstance(value, str) and column != "messages":
        value = [{"role": "user" if column == "prompt" else "assistant", "content": value}]
    if isinstance(value, (list, tuple)):
        value = [_with_marks(message) for message in value]
    return normalise_messages(value, row_name, column)


def _with_marks(message: Any) -> Any:
    content = message.get("content") if isinstance(message, dict) and message.get("role") == "user" else None
    return {**message, "content": marked_parts(content)} if isinstance(content, str) else message


def _trl_messages(record: dict[str, Any], stage: Stage, row_name: str, images: int) -> dict[str, list[Message]]:
    found = {
        name: _messages(record[name], row_name, name)
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
    elif stage == "prompt" and "prompt" in found:
        conversation = found["prompt"]
    elif "chosen" in found and "completion" not in found:
        _require(found, ("chosen", "rejected"), record, row_name)
        prompt, chosen, _ = _split_pair(found, row_name)
        conversation = prompt + (chosen if stage == "sft" else [])
    else:
        _require(found, ("prompt", "completion") if stage == "sft" else ("prompt",), record, row_name)
        conversation = found["prompt"] + found["completion"]
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
        problem = f"its human turns have {shown} {IMAGE_MARK}, but it has {images} image{'s' * (images != 1)}"
        reason = f"{IMAGE_MARK} count unlike the number of images"
        raise RowError(row_name, problem, f"Write {IMAGE_MARK} once for each image", reason)
    paired = record.get("chosen") is not None and record.get("rejected") is not None
    # SFT learns the better completion of a pair.
    completed = paired or stage == "preference" or (stage == "sft" and record.get("output_1") is not None)
    if completed and conversation and conversation[-1]["role"] == "assistant":
        conversation = conversation[:-1]
    if stage == "prompt" and paired:
        return {"prompt": conversation}
    if stage == "prompt":
        first = next((i for i, message in enumerate(conversation) if message["role"] == "user"), -1)
        return {"prompt": place_images(conversation[: first + 1], images, row_name)}
    if not completed:
        return {"prompt": conversation[:-1], "completion": conversation[-1:]}
    chosen, rejected = (
        (_llava_completion(record[name], row_name, name) for name in ("chosen", "rejected"))
        if paired
        else _llava_preference(record, row_name)
    )
    if stage == "sft":
        return {"prompt": conversation, "completion": [chosen]}
    return {"prompt": conversation, "chosen": [chosen], "rejected": [rejected]}


def _llava_preference(record: dict[str, Any], row_name: str) -> tuple[Message, Message]:
    _require(record, ("output_1", "output_2", "preference"), record, row_name)
    outputs = [_llava_completion(record[name], row_name, name) for name in ("output_1", "output_2")]
    preference = record["preference"]
    if type(preference) is not int or preference not in (1, 2):
        problem = f"preference is {preference!r}, expected 1 or 2"
        raise RowError(row_name, problem, "Correct the row", "preference outside {1, 2}")
    return outputs[preference - 1], outputs[2 - preference]


def _llava_completion(value: Any, row_name: str, where: str) -> Message:
    """A completion as a text or as a turn, whose `from` may be the name of any model."""
    if isinstance(value, str):
        value = {"value": value}
    return _llava_turn({**value, "from": "gpt"} if isinstance(value, dict) else value, row_name, where)


def _llava_turn(turn: Any, row_name: str, where: str) -> Message:
    speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if speaker not in LLAVA_ROLES or not isinstance(value, str):
        problem = f"{where} is {abridged(turn)}, expected `from` (human or gpt) and a text `value`"
        raise RowError(row_name, problem, "Correct the turn", "turn without speaker or text")
    content = marked_parts(value) if speaker == "human" else [{"type": "text", "text": value}]
    return {"role": LLAVA_ROLES[speaker], "content": content}


def _captions(record: dict[str, Any], row_name: str, column: str) -> list[str]:
    if column != "captions" and record.get("captions"):
        problem = f"it has captions, and captions_column is {column!r}"
        raise RowError(row_name, problem, "Keep one of them", "captions twice")
    captions = record.get(column)
    if captions is None:
        return []
    if isinstance(captions, str):
        captions = [captions] if captions.strip() else []
    if not isinstance(captions, (list, tuple)) or not all(isinstance(c, str) and c.strip() for c in captions):
        problem = f"{column} is {abridged(captions)}, expected a text or a list of texts"
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
            "Expected TRL's columns (`messages`; `prompt` and `completion`; `chosen` and `rejected`), LLaVA's "
            "(`conversations`; `output_1`, `output_2` and `preference`) or a layout of trl_llava.data.layouts",
            f"{missing[0]} missing",
        )
