"""The row contract: what a row holds, and the error that names one.

One record is one row; nothing runs beside it in another list. A normalised row has

- `row_name` (str): where it comes from, `train.json[17]`; every error about the row begins with it.
- `images` (list): `{"bytes", "path"}` references, decoded when a batch is made; empty for a text-only row.
- messages, by stage: sft `prompt` and `completion`; preference `prompt`, `chosen` and `rejected`; prompt `prompt`. A
  message's content is always a list of parts; an image part is the only markup, the characters `<image>` inside a
  text part are text.
- `captions` (list of str; preference, prompt), `answer_type` and `length_multiplier` (prompt), `margin` where given.
"""

from collections.abc import Sequence
from typing import Any, Literal

from datasets import Features, Image, List, Value

from trl_llava.errors import InputError, own_words
from trl_llava.prompts import Message

Stage = Literal["sft", "preference", "prompt"]

ANSWER_TYPES = ("general", "A", "B", "C", "D", "no", "yes")
"""Kinds of question: open, multiple choice with this letter as the right answer, yes/no with this right answer."""

ANSWERS: dict[str, tuple[str, ...]] = {"sft": ("completion",), "preference": ("chosen", "rejected"), "prompt": ()}
"""Message columns of each stage, beside `prompt`."""

_IMAGE = {"type": "image", "text": None}


class RowError(InputError):
    """A row, or a whole data set, that cannot be used.

    Args:
        row_name: The row, such as `train.json[17]`.
        problem: What was expected and what was found.
        fix: What to do about it.
        reason: The problem in a few words that are the same for every row of its kind; skipped rows are counted by it.

    Example:
        >>> print(RowError("train.json[17]", "preference is 3, expected 1 or 2", "Correct the row"))
        train.json[17]: preference is 3, expected 1 or 2. Correct the row.
    """

    def __init__(
        self, row_name: str, problem: str | None = None, fix: str | None = None, reason: str | None = None
    ) -> None:
        super().__init__(row_name, problem, fix, reason)  # all of them, so that a worker process can pickle it
        if problem is None or fix is None:  # torch makes anew what a DataLoader's worker raised, from one text
            text = own_words(type(self), row_name)
            if text == row_name:
                raise TypeError("RowError needs a row's name, the problem and the fix")
            row_name, _, stated = text.removesuffix(".").partition(": ")
            problem, _, fix = stated.rpartition(". ")
        self.row_name = row_name
        self.problem = problem
        self.fix = fix
        self.reason = reason or problem

    def __str__(self) -> str:
        return f"{self.row_name}: {self.problem}. {self.fix}."


def stage_features(stage: Stage, *, margin: bool = False) -> Features:
    """Return the columns of a normalised data set.

    Args:
        stage: Which stage reads it.
        margin: Whether preference rows have a `margin`.

    Returns:
        The features, without the further columns that prompt rows may carry.

    Raises:
        ValueError: If there is no such stage.
    """
    if stage not in ANSWERS:
        raise ValueError(f"stage is {stage!r}, expected one of {', '.join(ANSWERS)}.")
    messages = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    features = {"row_name": Value("string"), "images": List(Image(decode=False)), "prompt": messages}
    features.update(dict.fromkeys(ANSWERS[stage], messages))
    if stage != "sft":
        features["captions"] = List(Value("string"))
    if stage == "prompt":
        features.update(answer_type=Value("string"), length_multiplier=Value("float64"))
    if margin:
        features["margin"] = Value("float64")
    return Features(features)


def is_normalised(features: Features, stage: Stage) -> bool:
    """Tell whether a data set with these columns follows the row contract of a stage already."""
    return all(features.get(name) == feature for name, feature in stage_features(stage).items())


def normalise_messages(messages: Any, row_name: str, column: str = "prompt") -> list[Message]:
    """Bring messages to the form of the row contract: known roles, every content a list of parts.

    Args:
        messages: Messages with string content or a list of text and image parts.
        row_name: The row, for errors.
        column: Their column, for errors.

    Returns:
        New messages; `images` are not placed yet.

    Raises:
        RowError: If they are no messages, or hold something that is neither text nor an image.

    Example:
        >>> normalise_messages([{"role": "user", "content": "Hi"}], "row")
        [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}]
    """
    if not isinstance(messages, (list, tuple)):
        raise RowError(
            row_name,
            f"{column} is {abridged(messages)}, expected a list of messages",
            'Write it as [{"role": "user", "content": "..."}], or as an assistant message where it is an answer',
            f"{column} is no list of messages",
        )
    return [_message(message, row_name, f"{column}[{i}]") for i, message in enumerate(messages)]


def place_images(messages: Sequence[Message], images: int, row_name: str) -> list[Message]:
    """Show a row's images at the front of its first user turn, unless image parts show them already.

    Args:
        messages: Normalised messages.
        images: Number of images of the row.
        row_name: The row, for errors.

    Returns:
        Messages with one image part for each image.

    Raises:
        RowError: If image parts and images differ in number, or there is no user turn to show an image in.
    """
    shown = count_images(messages)
    if shown == images:
        return list(messages)
    if shown:
        raise RowError(
            row_name,
            f"its messages show {shown} image{'s' * (shown != 1)}, but it has {images}",
            "Give one image part for each image, or none to put them at the front of the first user turn",
            "image parts unlike the number of images",
        )
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RowError(row_name, "it has images but no user turn to show them in", "Add a user turn")
    user = {**messages[first], "content": [dict(_IMAGE) for _ in range(images)] + messages[first]["content"]}
    return [*messages[:first], user, *messages[first + 1 :]]


def count_images(messages: Sequence[Message]) -> int:
    """Count the image parts of normalised messages."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _message(message: Any, row_name: str, where: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant"):
        raise RowError(
            row_name,
            f"{where} has the role {role!r}, expected system, user or assistant"
            if role
            else f"{where} is {abridged(message)}, expected a dict with `role` and `content`",
            "Correct the message",
            "unknown role",
        )
    if message.get("tool_calls"):
        raise RowError(row_name, f"{where} calls tools, which are not supported", "Leave the row out", "tool calls")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise RowError(
            row_name,
            f"{where} has the content {abridged(content)}, expected a string or a list of parts",
            "Correct the message",
            "content is neither a string nor parts",
        )
    return {"role": role, "content": [_part(part, row_name, where) for part in content]}


def _part(part: Any, row_name: str, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image" and not any(part.get(key) for key in ("image", "url", "path", "base64")):
        return dict(_IMAGE)
    raise RowError(
        row_name,
        f"{where} holds the part {abridged(part)}, expected a text or an empty image part",
        "Put pictures into the `images` column, in the order of the image parts",
        "unknown message part",
    )


def abridged(value: Any) -> str:
    """Return a value as an error shows it: on one line, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
