"""Images made small, with the names of their files, for tables of samples, cards and pages."""

import base64
import io
import os
from pathlib import PurePath
from typing import Any, TypedDict

from PIL import Image

from trl_llava.data.images import ImageRef

SIDE = 256
"""Longest side of a thumbnail, in pixels."""


class Thumbnail(TypedDict):
    """An image as `datasets` stores one: the bytes of a JPEG, and a file name ("" where the row has none)."""

    bytes: bytes
    path: str


def thumbnail(image: Image.Image, name: str) -> Thumbnail:
    """A small copy of an RGB image with its name."""
    buffer = io.BytesIO()
    # With subsampling, small drawings lose their colours.
    made_small(image).save(buffer, format="JPEG", quality=90, subsampling=0)
    return {"bytes": buffer.getvalue(), "path": name}


def made_small(image: Image.Image, side: int = SIDE) -> Image.Image:
    """A copy of an image whose longest side is at most `side`."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def data_url(image: bytes) -> str:
    """The file of a PNG or JPEG as a URL that holds it, for pages that load nothing."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def image_name(ref: ImageRef) -> str:
    """The file name of an image of a row, without its folders; "" if it has none.

    >>> image_name({"bytes": None, "path": "coco/train2017/000000000009.jpg"})
    '000000000009.jpg'
    """
    path: Any = ref
    if isinstance(ref, dict):
        path = ref.get("path")
    elif isinstance(ref, Image.Image):
        path = getattr(ref, "filename", None)
    return PurePath(path).name if isinstance(path, (str, os.PathLike)) else ""
