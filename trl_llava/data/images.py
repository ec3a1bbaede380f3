"""Images of a row: found, checked and decoded to RGB."""

import functools
import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from trl_llava.data.contract import RowError
from trl_llava.data.fetch import check_is_a_name

MAX_PIXELS = int(os.environ.get("TRL_LLAVA_MAX_IMAGE_PIXELS", 89_478_485))
"""An image of more pixels is refused as a decompression bomb (Pillow's own limit: 256 MiB at 3 bytes a pixel)."""

MAX_ASPECT = 200
"""A strip longer than so many times its width is refused: resized by its short side it would fill gigabytes."""

FOLLOW_LINKS = os.environ.get("TRL_LLAVA_FOLLOW_IMAGE_LINKS") == "true"
"""Whether a symbolic link may lead out of the image folder."""

if "TRL_LLAVA_MAX_IMAGE_PIXELS" in os.environ:
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS

ImageRef = Image.Image | str | os.PathLike[str] | bytes | dict[str, Any] | torch.Tensor | np.ndarray
"""A decoded image, a path, the bytes of a file, `{"bytes": bytes | None, "path": str | None}`, or pixels.

Pixels are a tensor or an array of the shape (3, H, W) or (H, W, 3), 1 channel for grey, of whole numbers from 0 to
255 or fractions from 0 to 1.
"""

# What Pillow's readers raise on damaged files, by reading their sources: there is no common class.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of each EXIF orientation upright."""


def load_image(ref: ImageRef, row_name: str) -> Image.Image:
    """Decode one image to 8-bit RGB, so that it no longer needs its file.

    CMYK, palette and grey images are converted, 16-bit grey is scaled (not clipped) to 8 bits, transparency is
    dropped, the EXIF orientation is applied, and of an animation the first frame is taken.

    >>> load_image(Image.new("L", (4, 2), 255), "row").getpixel((0, 0))
    (255, 255, 255)
    """
    image = open_image(ref, row_name)
    try:
        image.load()  # before its metadata, which a PNG may have behind its pixels
        turn = _TURNS.get(_orientation(image))
        rgb = _to_rgb(image if turn is None else image.transpose(turn), row_name)
    except RowError:
        raise
    except _DAMAGED as error:
        raise _damaged(ref, row_name, error) from error
    rgb.info = {}  # nobody is to turn it once more
    return rgb


def load_images(rows: Sequence[dict[str, Any]]) -> list[list[Image.Image]]:
    """Decode the images of each row of a batch; a row without `images` has none."""
    return [[load_image(ref, row["row_name"]) for ref in row.get("images") or []] for row in rows]


def open_image(ref: ImageRef, row_name: str) -> Image.Image:
    """Open an image and check its header without decoding it; `size` is as stored, before the EXIF orientation."""
    if isinstance(ref, Image.Image):
        image = ref
    elif isinstance(ref, (torch.Tensor, np.ndarray)):
        image = _of_pixels(ref, row_name)
    else:
        source = _source(ref, row_name)
        try:
            image = Image.open(source)
        except Image.DecompressionBombError as error:
            raise _too_large(row_name, f"the image has more than {2 * MAX_PIXELS} pixels") from error
        except _DAMAGED as error:
            raise _damaged(ref, row_name, error) from error
    width, height = image.size
    if width == 0 or height == 0:
        problem = f"the image has no pixels ({width}x{height})"
        raise RowError(row_name, problem, "Replace it or leave the row out", "empty image")
    if width * height > MAX_PIXELS:
        raise _too_large(row_name, f"the image has {width}x{height} pixels, expected at most {MAX_PIXELS}")
    long, short = max(width, height), min(width, height)
    if long > MAX_ASPECT * short:
        problem = f"the image has {width}x{height} pixels, its sides differ more than {MAX_ASPECT} to 1"
        raise RowError(row_name, problem, "Crop it or leave the row out", "image too large")
    return image


def _of_pixels(pixels: torch.Tensor | np.ndarray, row_name: str) -> Image.Image:
    """The image of a tensor or an array."""
    values = torch.as_tensor(pixels).detach().cpu()
    channels = [axis for axis in (0, -1) if values.ndim == 3 and values.shape[axis] in (1, 3)]
    if not channels or not values.numel():
        problem = f"the image is an array of the shape {tuple(values.shape)}, expected (3, H, W) or (H, W, 3)"
        raise RowError(row_name, problem, "Give the pixels of one image, not normalised", "array is no image")
    values = values.movedim(channels[0], -1)
    highest = 1 if values.is_floating_point() else 255
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and high <= highest):  # nan is outside too
        problem = f"the image is an array with values from {low:g} to {high:g}, expected 0 to {highest}"
        raise RowError(row_name, problem, "Give the pixels as they are, not normalised", "unknown pixel range")
    if values.is_floating_point():
        values = (values.float() * 255).round()
    return Image.fromarray(values.to(torch.uint8).expand(*values.shape[:2], 3).contiguous().numpy())


def image_size(ref: ImageRef, row_name: str) -> tuple[int, int]:
    """Width and height in pixels, read from the header, as they are after the EXIF orientation is applied."""
    image = open_image(ref, row_name)
    width, height = image.size
    if image.format in ("PNG", "TIFF"):  # one has it behind its pixels, the other is turned when it is loaded
        try:
            image.load()
        except _DAMAGED as error:
            raise _damaged(ref, row_name, error) from error
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where the metadata cannot be read: the pixels are whole without it."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's parsers of EXIF and XMP raise nearly anything
        found = None
    # Pillow also stops, without a word, at the first entry that it cannot read.
    return found if isinstance(found, int) else _entry_of_orientation(image.info.get("exif"))


def _entry_of_orientation(exif: Any) -> int:
    """The orientation in the bytes of EXIF metadata, whatever the other entries of its first directory are; else 1."""
    data = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""
    order = ">" if data.startswith(b"MM") else "<"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, place)
            if (tag, kind) == (ExifTags.Base.Orientation, 3):
                return value
    except struct.error:
        pass
    return 1


def set_limits(max_pixels: int, follow_links: bool) -> None:
    """Set what a recipe allows, for this process and those that it starts."""
    global MAX_PIXELS, FOLLOW_LINKS
    MAX_PIXELS, FOLLOW_LINKS = max_pixels, follow_links
    Image.MAX_IMAGE_PIXELS = max_pixels
    # Worker processes that are spawned import this file anew.
    os.environ["TRL_LLAVA_MAX_IMAGE_PIXELS"] = str(max_pixels)
    os.environ["TRL_LLAVA_FOLLOW_IMAGE_LINKS"] = "true" if follow_links else "false"


def path_inside(folder: str | Path, name: str, row_name: str) -> str:
    """Join a file name of a data set to a folder that neither `..` nor a link may leave."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor != ""
    if not name or absolute or ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        raise RowError(
            row_name,
            f"the image file name is {name!r}, expected a name relative to the image folder {str(folder)!r}, "
            "without `..`",
            "Make the name relative to image_folder",
            "image outside its folder",
        )
    path = str(Path(folder) / name)
    if not FOLLOW_LINKS and not is_inside(path, folder):
        problem = f"the image {path} is a symbolic link to {os.path.realpath(path)}, outside the image folder"
        fix = "If you made the link, allow it with `follow_image_links: true`"
        raise RowError(row_name, problem, fix, "image outside its folder")
    return path


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a file is in a folder once all links are followed.

    A folder in the Hub's cache counts with the files that its links lead to.
    """
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError):  # a name that no file could have
        real = os.path.abspath(path)
    return real.startswith(_roots(str(folder)))


@functools.lru_cache(maxsize=64)
def _roots(folder: str) -> tuple[str, ...]:
    real = os.path.realpath(folder)
    roots = [real]
    if (marker := f"{os.sep}snapshots{os.sep}") in real:  # the Hub's cache keeps the files in a folder beside
        roots.append(os.path.join(real.partition(marker)[0], "blobs"))
    return tuple(root.rstrip(os.sep) + os.sep for root in roots)


def _source(ref: str | os.PathLike[str] | bytes | dict[str, Any], row_name: str) -> str | io.BytesIO:
    if isinstance(ref, dict):
        content, path = ref.get("bytes"), ref.get("path")
    elif isinstance(ref, bytes):
        content, path = ref, None
    else:
        content, path = None, os.fspath(ref) if isinstance(ref, os.PathLike) else ref
    if content is not None:
        if not content:
            raise RowError(row_name, "the image has no bytes", "Replace it or leave the row out", "empty image")
        return io.BytesIO(content)
    if not isinstance(path, str) or not path:
        problem = f"the image is {ref!r}, expected an image, a path, or a dict with `bytes` or `path`"
        raise RowError(row_name, problem, "Correct the row", "image missing")
    check_is_a_name(path, row_name)
    try:
        found = Path(path).is_file()
    except (OSError, ValueError):  # a name that no file could have
        found = False
    if not found:
        problem = f"the image file {path} does not exist"
        raise RowError(row_name, problem, "Check image_folder, or add the file", "image missing")
    return path


def _to_rgb(image: Image.Image, row_name: str) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: `convert` would clip at 255 and make nearly everything white.
        wide = image.mode == "I"
        image = image.convert("I")
        low, high = map(int, image.getextrema())  # type: ignore[arg-type]  # one band
        if low < 0 or high > 65535:
            raise _unknown_range(
                row_name, f"the image has values from {low} to {high}, expected 8 or 16 bits a channel"
            )
        if wide and 0 < high < 256:  # 32 bits that hold 8: as 16 they would be black
            raise _unknown_range(row_name, f"the image has 32-bit values up to {high}, of no known range")
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode == "F":
        raise _unknown_range(row_name, "the image has floating-point pixels, of no known range")
    return image.convert("RGB")


def _unknown_range(row_name: str, problem: str) -> RowError:
    return RowError(row_name, problem, "Convert it to 8-bit RGB", "unknown pixel range")


def _too_large(row_name: str, problem: str) -> RowError:
    fix = "Make it smaller (the model sees a few hundred pixels a side), or raise max_image_pixels"
    return RowError(row_name, problem, fix, "image too large")


def _damaged(ref: ImageRef, row_name: str, error: Exception) -> RowError:
    path = ref.get("path") if isinstance(ref, dict) else ref
    named = f"the image {path}" if isinstance(path, str) else "the image"
    fix = "Replace the file; on_bad_row `skip` leaves such rows out"
    return RowError(row_name, f"{named} cannot be read ({error})", fix, "damaged image")
