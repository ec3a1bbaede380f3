"""What is in a folder: its images, and for each file of rows which stages can read it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from PIL import Image

from trl_llava.data.captions import read_captions
from trl_llava.data.contract import COMPLETIONS, RowError, Stage
from trl_llava.data.row_maker import RowMaker
from trl_llava.data.sources import JSON_COLUMN, RawRows, json_record, read_source
from trl_llava.errors import ExplainedError, InputError

LOOKED_AT = 200
"""So many rows of each file say what it is; all rows are checked when its recipe is written."""
ROW_FILES = (".json", ".jsonl", ".parquet")
HELD_OUT = frozenset({"test", "eval", "val", "validation", "dev"})
"""Names of files that nobody wants to be trained on."""
OWN_FOLDERS = frozenset({"recipes", "runs"})
"""What `init` and the stages write into the folder."""


@dataclass
class RowFile:
    """A file of rows, and what its first rows are good for."""

    path: Path
    name: str  # as it is shown: from the folder on
    rows: int = 0
    usable: dict[Stage, int] = field(default_factory=dict)  # of the rows looked at
    problems: dict[Stage, str] = field(default_factory=dict)  # the first row that a stage cannot read
    captions: Literal["own", "joined"] | None = None  # where each row looked at has some: its own, or the file's
    image_folder: Path | None = None  # None where images are within the file, or beside it
    completions: list[str] = field(default_factory=list)  # texts of rows that SFT can learn

    def rows_for(self, stage: Stage) -> int:
        """How many rows a stage can use, if those that were not looked at are like those that were."""
        return max(1, round(self.rows * self.usable[stage] / min(self.rows, LOOKED_AT)))


@dataclass
class Found:
    """A folder, as far as the stages can use it."""

    folder: Path
    images: list[Path]
    files: list[RowFile]
    captions_file: Path | None
    captioned_images: int = 0
    left_out: list[str] = field(default_factory=list)  # files that are not used, with the reason


def look_into(folder: Path) -> Found:
    """Read the folder's files; one without any that can be read is an `InputError`."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is {'no folder' if folder.exists() else 'not there'}: give a folder with your rows."
        )
    readable = Image.registered_extensions()
    paths = sorted(_walk(folder))
    images = [path for path in paths if path.suffix.lower() in readable]
    found = Found(folder, images, [], None)
    tables = [path for path in paths if path.suffix.lower() in ROW_FILES]
    if not tables:
        raise InputError(
            f"{folder} has {len(images)} images and no file of rows: expected .json, .jsonl or .parquet, one record a "
            'row, such as {"images": ["cat.png"], "prompt": "What is this?", "completion": "A cat."}.'
        )
    for path in list(tables):
        if (captions := _captions_in(path)) is None:
            continue
        tables.remove(path)
        if found.captions_file is None:
            found.captions_file, found.captioned_images = path, len(captions)
        else:
            found.left_out.append(f"{path.relative_to(folder)}: a second file of captions")
    places = _Places(folder, images)
    for path in tables:
        if path.stem.lower() in HELD_OUT:
            found.left_out.append(f"{path.relative_to(folder)}: by its name it is not for training")
            continue
        try:
            file = _row_file(path, found, places)
        except (ExplainedError, ValueError) as error:
            found.left_out.append(f"{path.relative_to(folder)}: {' '.join(str(error).split())[:300]}")
            continue
        if file.usable:
            found.files.append(file)
        else:
            found.left_out.append(f"{file.name}: no stage can read its rows; for PPO, {file.problems['prompt']}")
    if not found.files:
        raise InputError(f"nothing in {folder} can be trained on: " + "; ".join(found.left_out))
    return found


def _walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files, but for hidden ones and what `init` and the stages write; no link leads back up."""
    above |= {folder.resolve()}
    for path in folder.iterdir():
        if path.name.startswith(".") or (len(above) == 1 and path.is_dir() and path.name in OWN_FOLDERS):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in above:
            yield from _walk(path, above)


def _captions_in(path: Path) -> dict[str, list[str]] | None:
    """The captions of `{image name: [captions]}`; None for a file that is something else."""
    if path.suffix.lower() != ".json":
        return None
    try:
        return read_captions(str(path)) or None
    except (InputError, RecursionError):
        return None


class _Places:
    """Where the images of a folder are, by the last part of their names."""

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        self.by_name: dict[str, list[str]] = {}
        for path in images:
            self.by_name.setdefault(path.name, []).append(path.as_posix())

    def folder_of(self, names: Sequence[str], own: str | None) -> Path | None:
        """The folder that most of these image names are relative to; `own`, where rows look by themselves, goes first.

        Two others that have as many of them are an `InputError`: the pictures may differ.
        """
        places: Counter[str] = Counter()
        for name in names:
            for path in self.by_name.get(PurePosixPath(name).name, ()):
                if path.endswith(f"/{name}"):
                    places[path.removesuffix(f"/{name}")] += 1
        if not places:
            return None
        most = [place for place, count in places.items() if count == max(places.values())]
        if own is not None and own in most:
            return Path(own)
        if len(most) == 1:
            return Path(most[0])
        raise InputError(
            f"its images are in {' and in '.join(sorted(most))} alike: move it beside the right ones, or others away"
        )


def _row_file(path: Path, found: Found, places: _Places) -> RowFile:
    raw = read_source(path)
    records = raw.dataset.with_format("arrow")[: min(LOOKED_AT, len(raw.dataset))].to_pylist()
    file = RowFile(path, str(path.relative_to(found.folder)), len(raw.dataset))
    folder = places.folder_of(list(_image_names(raw, records)), raw.image_folder)
    if folder is not None and str(folder) != raw.image_folder:
        file.image_folder = folder
    for stage in get_args(Stage):
        rows = _rows(raw, records, stage, folder, None)
        usable = [row for row in rows if not row.get("_reason")]
        if usable:
            file.usable[stage] = len(usable)
        if len(usable) < len(rows):
            bad = next(row for row in rows if row.get("_reason"))
            file.problems[stage] = str(RowError(bad["row_name"], bad["_problem"], bad["_fix"]))
        if stage == "sft":
            file.completions = [_text(row) for row in usable]
        elif usable and all(row["captions"] for row in usable):
            file.captions = "own"
        elif usable and found.captions_file is not None:
            joined = _rows(raw, records, stage, folder, found.captions_file)
            file.captions = "joined" if sum(bool(row.get("captions")) for row in joined) == len(usable) else None
    return file


def _rows(
    raw: RawRows, records: Sequence[dict[str, Any]], stage: Stage, folder: Path | None, captions_file: Path | None
) -> list[dict[str, Any]]:
    """The records as rows of a stage; one that cannot be used says why."""
    maker = RowMaker.of(raw, stage, folder or raw.image_folder, captions_file, False, decode=False)
    return [maker.row(record, index) for index, record in enumerate(records)]


def _image_names(raw: RawRows, records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The image names of some records."""
    for record in records:
        if raw.is_json:
            try:
                record = json_record(record[JSON_COLUMN])
            except ValueError:
                continue
        if not isinstance(record, dict):
            continue
        for column in ("images", "image", "Image", "img_path"):
            value = record.get(column)
            for image in value if isinstance(value, list) else [value]:
                name = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
                if isinstance(name, str):
                    yield name


def _text(row: dict[str, Any]) -> str:
    (column,) = COMPLETIONS["sft"]
    return "".join(part["text"] for message in row[column] for part in message["content"] if part["type"] == "text")
