"""What a reward function is asked about, as TRL hands it over: conversations, and which of them ask the same."""

import hashlib
from collections.abc import Sequence

from PIL import Image

from trl_llava.data.images import ImageRef
from trl_llava.prompts import Message

Conversation = str | list[Message]
"""A prompt or a completion as TRL hands it over: text, or messages whose content is text or a list of parts."""


def same_prompts(rows: Sequence[tuple]) -> list[int]:
    """Find the rows that ask the same.

    Args:
        rows: B tuples that begin with prompt, completion and pictures; `None` for pictures that are in the prompt.

    Returns:
        For each row the first one that has the same prompt and pictures.
    """
    first: dict[tuple[str, ...], int] = {}
    known: dict[int, str] = {}  # answers to one prompt mostly come with the very same pictures
    groups = []
    for row, (prompt, _, pictures, *_) in enumerate(rows):
        asked, inside = without_pictures(prompt, "user")
        own = inside if pictures is None else pictures if isinstance(pictures, list | tuple) else [pictures]
        for picture in own:
            if id(picture) not in known:
                known[id(picture)] = _picture_key(picture)
        groups.append(first.setdefault((repr(asked), *(known[id(picture)] for picture in own)), row))
    return groups


def _picture_key(picture: ImageRef) -> str:
    """What two pictures have in common if they are the same."""
    if not isinstance(picture, Image.Image):
        return repr(picture)
    pixels = hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()
    return repr((picture.mode, picture.size, picture.getpalette(), picture.info, pixels))


def without_pictures(conversation: Conversation, role: str) -> tuple[list[Message], list[ImageRef]]:
    """Take pictures out of a conversation, where TRL's trainers put them.

    Args:
        conversation: Text or messages.
        role: Whose a text is.

    Returns:
        Messages whose image parts are empty, and the pictures that were in them.
    """
    if isinstance(conversation, str):
        return [{"role": role, "content": conversation}], []
    pictures: list[ImageRef] = []
    messages = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, list):
            pictures += [part["image"] for part in content if part.get("type") == "image" and part.get("image")]
            content = [{"type": "image"} if part.get("type") == "image" else part for part in content]
        messages.append({**message, "content": content})
    return messages, pictures
