"""The row contract: what a row holds, and the error that names one.

One record is one row; nothing runs beside it in another list. A normalised row has

- `row_name` (str): where it comes from, `train.json[17]`; every error about the row begins with it.
- `images` (list): `{"bytes", "path"}` references, decoded when a batch is made; empty for a text-only row.
- messages, by stage: sft `prompt` and `completion`; preference `prompt`, `chosen` and `rejected`; prompt `prompt`. A
  message's content is always a list of parts; an image part is the only markup, the characters `<image>` inside a
  text part are text.
- `captions` (list of str; preference, prompt), `answer_type` and `length_multiplier` (prompt), `margin` where given.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from datasets import Features, Image, List, Value

from trl_llava.errors import InputError, own_words
from trl_llava.prompts import Message

Stage = Literal["sft", "preference", "prompt"]

ANSWER_TYPES = ("general", "A", "B", "C", "D", "no", "yes")
"""Kinds of question: open, multiple choice with this letter as the right answer, yes/no with this right answer."""

COMPLETIONS: dict[str, tuple[str, ...]] = {"sft": ("completion",), "preference": ("chosen", "rejected"), "prompt": ()}
"""Message columns of each stage, beside `prompt`."""

NO_CAPTIONS = "no captions"
"""The reason by which rows without captions are counted."""

TIE = "tie"
"""The reason by which pairs are counted that no rating orders; they are left out whatever `on_bad_row` says."""

IMAGE_MARK = "<image>"
"""Marks the place of an image in a user's text."""

_IMAGE = {"type": "image", "text": None}
_ANY_MARK = re.compile(
    r"<image([ _]?\d+)?>|<\|image(_\d+|_pad)?\|>|<(start_of_image|image_soft_token|image_placeholder)>"
    r"|<IMG_CONTEXT>|<ImageHere>|\[IMG\]"
)
"""What models and data sets write where an image is; `IMAGE_MARK` alone has that meaning in a row's text."""
_OF_IMAGES = frozenset({"image", "image_url", "url", "path", "base64", "bytes", "data"})


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
        self.row_name = _shortened(row_name, 200)
        self.problem = _shortened(problem, 600)
        self.fix = fix
        self.reason = reason or problem

    def __str__(self) -> str:
        return f"{self.row_name}: {self.problem}. {self.fix}."


def _shortened(text: str, most: int) -> str:
    """A text without its middle where it is longer: whatever a row holds, a base64 image or a book, may be quoted."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def names_or_numbers(names: Sequence[str] | None, rows: int) -> list[str]:
    """What errors call each row: its `row_name`, or its number where the caller knows no names."""
    return list(names) if names is not None else [f"row {i}" for i in range(rows)]


def check_captions(captions: Sequence[str] | None, row_name: str) -> None:
    """Refuse a row without captions, where the judging prompt shows them or a reward function reads them."""
    if not captions:
        raise RowError(
            row_name,
            "it has no captions, but the reward needs them",
            "Give a `captions` column or captions_file, leave the row out, or set with_captions to false for the "
            "reward model",
            NO_CAPTIONS,
        )


def check_one_image(images: Sequence[Any], row_name: str, reader: str) -> None:
    """Refuse a row with several images, where `reader` would process each as if it were the only one of its row."""
    if len(images) > 1:
        raise RowError(
            row_name,
            f"it has {len(images)} images, and {reader} would process each as if it were alone",
            "Leave such rows out, or use `trl-llava ppo` without use_vllm, or `dpo`, which take them",
            "several images",
        )


def stage_features(stage: Stage, *, margin: bool = False) -> Features:
    """The columns of a normalised data set, without the further ones that prompt rows may carry."""
    if stage not in COMPLETIONS:
        raise ValueError(f"stage is {stage!r}, expected one of {', '.join(COMPLETIONS)}.")
    messages = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    features = {"row_name": Value("string"), "images": List(Image(decode=False)), "prompt": messages}
    features.update(dict.fromkeys(COMPLETIONS[stage], messages))
    if stage != "sft":
        features["captions"] = List(Value("string"))
    if stage == "prompt":
        features.update(answer_type=Value("string"), length_multiplier=Value("float64"))
    if margin:
        features["margin"] = Value("float64")
    return Features(features)


def is_normalised(features: Features, stage: Stage) -> bool:
    """Whether a data set with these columns follows the row contract of a stage already."""
    return all(features.get(name) == feature for name, feature in stage_features(stage).items())


def normalise_messages(messages: Any, row_name: str, column: str = "prompt") -> list[Message]:
    """Bring the messages of a column to the form of the row contract; `images` are not placed yet.

    >>> normalise_messages([{"role": "user", "content": "Hi"}], "row")
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}]
    """
    if not isinstance(messages, (list, tuple)):
        raise RowError(
            row_name,
            f"{column} is {abridged(messages)}, expected a list of messages",
            'Write it as [{"role": "user", "content": "..."}], or with the role "assistant" for a completion',
            f"{column} is no list of messages",
        )
    return [_message(message, row_name, f"{column}[{i}]") for i, message in enumerate(messages)]


def place_images(messages: Sequence[Message], images: int, row_name: str) -> list[Message]:
    """Show a row's images at the front of its first user turn, unless image parts place them already."""
    shown = count_images(messages)
    if shown == images:
        return list(messages)
    if shown:
        problem = f"its messages show {shown} image{'s' * (shown != 1)}, but it has {images}"
        fix = "Give one image part for each image, or none to put them at the front of the first user turn"
        raise RowError(row_name, problem, fix, "image parts unlike the number of images")
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    first = users[0] if users else None
    parts = [part for i in users for part in messages[i]["content"]]
    mark = next(filter(None, (_ANY_MARK.search(part["text"] or "") for part in parts)), None)
    if images and mark is not None:
        problem = f"a user's text has {mark[0]}, which is no image there"
        fix = f'Write {IMAGE_MARK} in a text, or {{"type": "image"}} beside the text parts before and after it'
        raise RowError(row_name, problem, fix, "image mark that is text")
    if first is None:
        raise RowError(row_name, "it has images but no user turn to show them in", "Add a user turn")
    user = {**messages[first], "content": [dict(_IMAGE) for _ in range(images)] + messages[first]["content"]}
    return [*messages[:first], user, *messages[first + 1 :]]


def marked_parts(text: str) -> list[dict[str, Any]]:
    """The parts of a user's text in which `<image>` marks the place of each image.

    >>> marked_parts("<image>\\nIs <image> larger?")  # what surrounds the text goes, as in LLaVA's own data code
    [{'type': 'image', 'text': None}, {'type': 'text', 'text': 'Is '}, {'type': 'image', 'text': None}, \
{'type': 'text', 'text': ' larger?'}]
    """
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    written = [i for i, piece in enumerate(pieces) if piece.strip()]
    content: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        content += [dict(_IMAGE)] if i else []
        if written and written[0] <= i <= written[-1]:
            piece = piece.lstrip() if i == written[0] else piece
            piece = piece.rstrip() if i == written[-1] else piece
            content += [{"type": "text", "text": piece}] if piece else []
    return content


def count_images(messages: Sequence[Message]) -> int:
    """Count the image parts of messages."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return sum(part["type"] == "image" for content in contents for part in content)


def _message(message: Any, row_name: str, where: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant"):
        problem = f"{where} has the role {role!r}, expected system, user or assistant"
        if not role:
            problem = f"{where} is {abridged(message)}, expected a dict with `role` and `content`"
        raise RowError(row_name, problem, "Correct the message", "unknown role")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        problem = f"{where} has the content {abridged(content)}, expected a string or a list of parts"
        raise RowError(row_name, problem, "Correct the message", "content is neither a string nor parts")
    return {"role": role, "content": [_part(part, row_name, where) for part in content]}


def _part(part: Any, row_name: str, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    further = {key for key, value in part.items() if value and key not in ("type", "index")} if kind else set()
    if kind == "text" and isinstance(part.get("text"), str) and not further & _OF_IMAGES:
        return {"type": "text", "text": part["text"]}
    if kind == "image" and not further:
        return dict(_IMAGE)
    problem = f"{where} holds the part {abridged(part)}, expected a text or an empty image part"
    fix = "Put images into the `images` column, in the order of the image parts"
    raise RowError(row_name, problem, fix, "unknown message part")


def abridged(value: Any) -> str:
    """A value as an error shows it: on one line, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
