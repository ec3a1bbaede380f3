"""Data sets with one row of a hundred bad in each way there is; each picture carries its row's mark.

The picture of row `n` has the colour that `n` stands for (`mark`), and its question names `n`.
"""

import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

Record = dict[str, Any]
SIZE = (8, 6)


def mark(number: int) -> tuple[int, int, int]:
    """The colour of a row's picture."""
    return (number % 256, number // 256, 99)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-24])  # its header is whole: only decoding finds it


def _huge(path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def _image(change: Callable[[Path], Any]) -> Callable[[Record, Path], None]:
    return lambda record, folder: change(folder / record["image"])


def _fields(**values: Any) -> Callable[[Record, Path], None]:
    return lambda record, folder: record.update(values)


def _no_mark(record: Record, folder: Path) -> None:
    first = record["conversations"][0]
    first["value"] = first["value"].replace("<image>", "")


def _same(record: Record, folder: Path) -> None:
    record["output_2"] = record["output_1"]


def _long(record: Record, folder: Path) -> None:
    record["conversations"][0]["value"] += " really?" * 400


ALL, PAIRS, PROMPTS = ("sft", "preference", "prompt"), ("preference",), ("prompt",)
TOO_LONG = "too long"
BAD: list[tuple[str, tuple[str, ...], str, Callable[[Record, Path], Any]]] = [
    ("missing file", ALL, "image missing", _image(Path.unlink)),
    ("gap", ALL, "image missing", _fields(image=[None])),
    ("corrupt", ALL, "damaged image", _image(lambda path: path.write_bytes(b"\x89PNG, or so it says"))),
    ("cut", ALL, "damaged image", _image(_cut)),
    ("no bytes", ALL, "damaged image", _image(lambda path: path.write_bytes(b""))),
    ("no pixels", ALL, "damaged image", _image(lambda path: path.write_bytes(b"P6\n0 0\n255\n"))),
    ("bomb", ALL, "image too large", _image(_huge)),
    ("elsewhere", ALL, "image outside its folder", _fields(image="../secret.png")),
    ("no <image>", ALL, "<image> count unlike the number of images", _no_mark),
    ("no speaker", ALL, "turn without speaker or text", _fields(conversations=[{"from": "bot", "value": "x"}])),
    ("no question", ALL, "no question", _fields(conversations=[], image=None)),
    ("not JSON", ALL, "not JSON", lambda record, folder: "{oops"),
    ("no object", ALL, "it is a JSON list, expected an object", lambda record, folder: "[]"),
    (TOO_LONG, ALL, TOO_LONG, _long),
    ("no answer", ("sft",), "no question", lambda record, folder: record["conversations"].pop()),
    ("no text", ("sft",), "empty completion", lambda record, folder: record["conversations"][1].update(value=" ")),
    ("third", PAIRS, "preference outside {1, 2}", _fields(preference=3)),
    ("same", PAIRS, "chosen equal to rejected", _same),
    ("no captions", PAIRS, "no captions", _fields(captions=[])),
    ("no captions key", PAIRS, "no captions", lambda record, folder: record.pop("captions") and None),
    ("caption", (*PAIRS, *PROMPTS), "captions are no list of texts", _fields(captions=["", 7])),
    ("answer type", PROMPTS, "unknown answer type", _fields(answer_type="E")),
    ("multiplier", PROMPTS, "length_multiplier is no number", _fields(length_multiplier=float("nan"))),
]
"""Name, stages that mind, reason it is counted by, and what makes a good record bad."""

ODD = {
    "cmyk": lambda image, path: image.convert("CMYK").save(path, "TIFF"),
    "animated": lambda image, path: image.save(path, "GIF", save_all=True, append_images=[Image.new("RGB", SIZE)]),
    "alpha": lambda image, path: image.convert("RGBA").save(path, "PNG"),
    "palette": lambda image, path: image.convert("P", palette=Image.Palette.ADAPTIVE).save(path, "PNG"),
}
"""Pictures that can be used, and look like trouble."""


def write(folder: Path, stage: str, rows: int) -> tuple[Path, Counter[str], list[int]]:
    """Write `<stage>.jsonl` and its pictures.

    Args:
        folder: Where to.
        stage: "sft", "preference" or "prompt".
        rows: How many rows, a multiple of 100; of each hundred one is bad in each way.

    Returns:
        The file, how many bad rows it has by reason, and the numbers of the good ones.
    """
    (folder / "images").mkdir(parents=True)
    bad = [kind for kind in BAD if stage in kind[1]]
    counts: Counter[str] = Counter()
    good, lines = [], []
    for number in range(rows):
        place = (number * 37 + number // 100) % 100  # kinds stand apart, and not at the same place in every hundred
        record = good_record(number, stage, text_only=place in (90, 91))
        if record["image"]:
            odd = list(ODD.values())[place - 80] if 80 <= place < 84 else Image.Image.save
            odd(Image.new("RGB", SIZE, mark(number)), folder / "images" / record["image"])
        line = None
        if place < len(bad):
            _, _, reason, spoil = bad[place]
            counts[reason] += 1
            line = spoil(record, folder / "images")
        else:
            good.append(number)
        lines.append(line if isinstance(line, str) else json.dumps(record))
    path = folder / f"{stage}.jsonl"
    path.write_text("\n".join(lines))
    return path, counts, good


def good_record(number: int, stage: str, *, text_only: bool) -> Record:
    """A record in LLaVA's format."""
    asked = f"What is in picture {number}?"
    question = {"from": "human", "value": asked if text_only else f"<image>\n{asked}"}
    record: Record = {"image": None if text_only else f"{number}.png", "conversations": [question]}
    if stage == "sft":
        record["conversations"].append({"from": "gpt", "value": f"There is a square of {number}."})
    else:
        record["captions"] = [f"a caption of {number}", "a square"]
    if stage == "preference":
        record |= {"output_1": {"from": "gpt", "value": "a square"}, "output_2": {"from": "gpt", "value": "a dog"}}
        record["preference"] = number % 2 + 1
    if stage == "prompt":
        record["answer_type"] = ("general", "yes", "no", "B")[number % 4]
    return record


def number_of(text: str) -> int:
    """Which row a text says it belongs to."""
    numbers = set(re.findall(r"picture (\d+)\?", text))
    assert len(numbers) == 1, text
    return int(numbers.pop())


def check_marks(texts: Sequence[str], has_image: Sequence[bool], pixels: torch.Tensor | None, processor: Any) -> None:
    """Hold the pictures of a batch against its questions.

    Args:
        texts: B texts.
        has_image: For each of them whether it shows a picture.
        pixels: The processor's pictures of those that do, in their order (I, 3, height, width).
        processor: Knows how colours were scaled.
    """
    numbers = [number_of(text) for text, shown in zip(texts, has_image, strict=True) if shown]
    if pixels is None:
        assert not numbers
        return
    image = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (image.image_mean, image.image_std))
    seen = ((pixels * std + mean) * 255).round().int()
    assert len(seen) == len(numbers)
    for number, picture in zip(numbers, seen, strict=True):
        assert (picture == torch.tensor(mark(number))[:, None, None]).all(), (number, picture[:, 0, 0])
