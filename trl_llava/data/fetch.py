"""Images that rows name by URL: refused, or fetched where the recipe asks for it."""

import functools
import http.client
import time
import urllib.error
import urllib.request

from trl_llava.data.contract import RowError, abridged

TIMEOUT = 20.0
"""Seconds: a server has so long to answer, and again so long to send an image."""

MAX_BYTES = 50 * 2**20
"""A longer answer is refused: no image that is trained on needs so much."""


def is_url(image: str) -> bool:
    """Whether the name of an image is a URL that can be fetched."""
    return image.lower().startswith(("http://", "https://"))


def check_is_a_name(image: str, row_name: str) -> None:
    """Refuse what other tools take for an image: a link, or the image itself as text."""
    if is_url(image):
        fix = "Set `fetch_images: true` to fetch such images, or download them and name their files"
        raise RowError(row_name, f"its image is a URL ({abridged(image)})", fix, "image is a URL")
    # The first bytes of JPEG, PNG, GIF and WEBP files; no file name is that long.
    if image.startswith("data:") or (len(image) > 255 and image.startswith(("/9j/", "iVBORw0K", "R0lGOD", "UklGR"))):
        problem = f"its image is base64 text ({abridged(image)})"
        raise RowError(row_name, problem, "Decode it to bytes or a file", "image is base64")


def fetch(url: str, row_name: str) -> bytes:
    """The bytes behind a URL; rows that ask for the same one in turn fetch it once."""
    try:
        return _fetch(url)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) if isinstance(error, urllib.error.URLError) else None
        cause = f"HTTP {error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else reason or error
        problem = f"its image {abridged(url)} cannot be fetched ({' '.join(str(cause).split())})"
        raise RowError(row_name, problem, "Correct the URL, or leave the row out", "image not fetched") from error


@functools.lru_cache(maxsize=32)
def _fetch(url: str) -> bytes:
    # Some servers answer no client without a name.
    request = urllib.request.Request(url, headers={"User-Agent": "trl_llava (image data set)"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        deadline, content = time.monotonic() + TIMEOUT, bytearray()
        while part := answer.read1(2**16):
            content += part
            if len(content) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES // 2**20} MiB")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not there after {TIMEOUT:.0f} s")
    expected = answer.headers.get("Content-Length")
    if expected is not None and len(content) != int(expected):
        raise ValueError(f"{len(content)} of {expected} bytes came")
    return bytes(content)
