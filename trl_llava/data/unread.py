"""Content of a record that no stage reads: the row is refused, for without it it would teach another thing."""

from collections.abc import Container, Iterator
from pathlib import PurePath
from typing import Any

from trl_llava.data.contract import RowError, Stage, abridged

UNSUPPORTED_COLUMNS = {
    **dict.fromkeys(("video", "videos"), "a video, which is not supported"),
    **dict.fromkeys(("audio", "audios"), "audio, which is not supported"),
    "tools": "tools, which are not supported",
    "history": "earlier turns: write them into `messages`",
    "system_prompt": "the system message: call the column `system`",
    **dict.fromkeys(
        ("chosen_image", "chosen_images", "rejected_image", "rejected_images"),
        "images of one completion: both of a pair see the same",
    ),
}
"""Columns of content that no stage reads."""

_ALTERNATIVES = (("conversations", "messages"), ("conversations", "completion"), ("messages", "completion"))
"""Columns of which only one would be read."""

_TURN_CONTENT = "image images video videos audio audios tool_calls function_call reasoning_content reasoning thinking"
# OpenAI's, ms-swift's, axolotl's: 0 is not to be learned
_TURN_WEIGHTS = ("weight", "loss", "loss_scale", "train", "training", "train_on_turn")
_PICTURES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
_PICTURE_COLUMNS = frozenset({"image_url", "image_urls", "image_path", "image_paths", "image_file"})
"""Names under which a text is a picture, whatever it ends with."""


def refuse_unread(record: dict[str, Any], stage: Stage, row_name: str) -> None:
    """Refuse columns, keys of turns and orders of images that would be passed over."""
    for name in UNSUPPORTED_COLUMNS:
        if not _is_empty(record.get(name)):
            problem = f"its column {name} has {UNSUPPORTED_COLUMNS[name]}"
            raise RowError(row_name, problem, "Leave the row out, or drop the column", f"{name} not supported")
    for names in _ALTERNATIVES:
        if all(record.get(name) for name in names):
            raise RowError(row_name, f"it has {' and '.join(names)}", "Keep one of them", "two conversations")
    for column in ("conversations", "messages", "prompt", "completion", "chosen", "rejected"):
        turns = record.get(column)
        shown = 0
        for i, turn in enumerate(turns if isinstance(turns, (list, tuple)) else ()):
            if isinstance(turn, dict):
                _check_turn(turn, stage, row_name, f"{column}[{i}]")
                for part in _image_parts(turn):
                    if part.get("index") not in (None, shown):
                        problem = f"{column}[{i}] shows image {part['index']} where image {shown} stands"
                        fix = "Put the images into the order of their parts"
                        raise RowError(row_name, problem, fix, "images in another order")
                    shown += 1


def refuse_other_images(record: dict[str, Any], known: Container[str], row_name: str) -> None:
    """Refuse a row without images of which a column that nobody reads holds one."""
    for name, value in record.items():
        shown = _is_picture(value) or (name in _PICTURE_COLUMNS and not _is_empty(value))
        if name not in known and name != "id" and shown:
            problem = f"it has no image, but its column {name} holds {abridged(value)}"
            raise RowError(row_name, problem, "Call the column `image`, or drop it", "image in another column")


def _check_turn(turn: dict[str, Any], stage: Stage, row_name: str, where: str) -> None:
    for key in _TURN_CONTENT.split():
        if turn.get(key):
            problem = f"{where} has {key}, which is not read"
            fix = "Put images into the `images` column of the row, or leave it out"
            raise RowError(row_name, problem, fix, f"{key} in a turn")
    for key in (*_TURN_WEIGHTS, "masked") if stage == "sft" else ():
        if turn.get(key) is not None and bool(turn[key]) == (key == "masked"):
            problem = f"{where} is not to be learned ({key}: {turn[key]!r}), which is not read"
            raise RowError(
                row_name, problem, "Leave the row out, or drop the key to learn the turn", f"{key} in a turn"
            )


def _image_parts(turn: dict[str, Any]) -> Iterator[dict[str, Any]]:
    content = turn.get("content")
    for part in content if isinstance(content, (list, tuple)) else ():
        if isinstance(part, dict) and part.get("type") == "image":
            yield part


def _is_empty(value: Any) -> bool:
    """Also a JSON text without anything in it, and a list of nothing."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return not value or (isinstance(value, list) and all(map(_is_empty, value)))


def _is_picture(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_picture, value))
    if isinstance(value, dict):
        return (value.keys() == {"bytes", "path"} and any(value.values())) or any(map(_is_picture, value.values()))
    if not isinstance(value, str) or len(value) >= 256:
        return False
    name = value.partition("?")[0].partition("#")[0] if "://" in value else value
    return PurePath(name).suffix.lower() in _PICTURES
