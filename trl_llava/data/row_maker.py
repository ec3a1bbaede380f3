"""One record of a data set to one row: its format turned, its images found and checked, its captions joined."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Features, Value
from huggingface_hub import constants

from trl_llava.data.captions import captions_of, read_captions
from trl_llava.data.contract import COMPLETIONS, RowError, Stage, abridged, check_captions, stage_features
from trl_llava.data.fetch import check_is_a_name, fetch, is_url
from trl_llava.data.formats import KNOWN_COLUMNS, to_row
from trl_llava.data.images import is_inside, load_image, open_image, path_inside
from trl_llava.data.layouts import RATED, layout_columns
from trl_llava.data.sources import JSON_COLUMN, RawRows, has_numbers, json_columns, json_record
from trl_llava.data.unread import UNSUPPORTED_COLUMNS

PROBLEM_COLUMNS = ("_reason", "_problem", "_fix")
"""What is wrong with a row, as in `RowError`; empty for a row that can be used."""

RESERVED_COLUMNS = frozenset({*PROBLEM_COLUMNS, RATED, "prompts", "completions", "completion_ids"})
"""Columns that a data set cannot have: those that rows are checked with, and what reward functions get beside it."""


@dataclass
class RowMaker:
    """Turns records into rows of a stage, in worker processes, so it holds only what travels cheaply.

    `name` is what errors call the data set, and `columns` are those to read of JSON records (None for all).
    `trusted_paths` is True where image paths come from the caller or from `datasets` itself, not from the data, and
    `decode` where images are decoded to find damaged ones, not only opened.
    """

    name: str
    stage: Stage
    features: Features
    is_json: bool = False
    columns: list[str] | None = None
    trusted_paths: bool = False
    image_folder: str | Path | None = None
    captions_file: str | Path | None = None
    require_captions: bool = False
    decode: bool = False
    unread: tuple[str, ...] = ()  # columns that may hold content, and that the stage does not read
    captions_column: str = "captions"
    rating: str | None = None
    fetch_images: bool = False

    @classmethod
    def of(
        cls,
        raw: RawRows,
        stage: Stage,
        image_folder: str | Path | None,
        captions_file: str | Path | None,
        require_captions: bool,
        *,
        decode: bool,
        captions_column: str = "captions",
        rating: str | None = None,
        fetch_images: bool = False,
    ) -> "RowMaker":
        """The maker for a data set as found, whose columns are checked."""
        if not len(raw.dataset):
            raise RowError(raw.name, "it is empty, expected at least one row", "Check the file and the split", "empty")
        columns = json_columns(raw, KNOWN_COLUMNS) if raw.is_json else dict(raw.dataset.features)
        known = KNOWN_COLUMNS | layout_columns(columns)
        _check_columns(columns, known, raw.name, captions_column)
        carried = {name: feature for name, feature in columns.items() if name not in (*known, *UNSUPPORTED_COLUMNS)}
        unread = () if stage == "prompt" else tuple(sorted({*carried} - {"id", captions_column}))
        if stage != "prompt":  # whose columns reward functions may read
            carried = {}
        if captions_file is not None:
            read_captions(str(captions_file))  # a broken file is reported once, not by every worker
        margin = stage == "preference" and "margin" in columns and has_numbers(raw, "margin")
        features = Features({**stage_features(stage, margin=margin), **carried})
        found = (raw.is_json, raw.columns, raw.trusted_paths)
        return cls(
            *(raw.name, stage, features, *found, image_folder, captions_file),
            require_captions=require_captions,
            decode=decode,
            unread=unread,
            captions_column=captions_column,
            rating=rating,
            fetch_images=fetch_images,
        )

    def batch(self, table: pa.Table, indices: list[int]) -> dict[str, list[Any]]:
        """Columns of the rows of one batch, `PROBLEM_COLUMNS` among them; for `Dataset.map` in Arrow format."""
        rows = [self.row(record, index) for record, index in zip(table.to_pylist(), indices, strict=True)]
        return {name: [row.get(name) for row in rows] for name in [*self.features, *PROBLEM_COLUMNS]}

    def row(self, record: dict[str, Any], index: int) -> dict[str, Any]:
        """One row; one that cannot be used has no content and says why in `PROBLEM_COLUMNS`."""
        name = f"{self.name}[{record['index'] if self.is_json else index}]"
        try:
            if self.is_json:
                record = self._parsed(record[JSON_COLUMN], name)
            name = record.get("row_name") or name
            row = to_row(record, self.stage, name, captions_column=self.captions_column, rating=self.rating)
            paths = [_path_of(image) for image in row["images"]]
            row["images"] = [self._reference(image, name) for image in row["images"]]
            for ref in row["images"]:
                (load_image if self.decode else open_image)(ref, name)
            if "margin" in self.features and "margin" not in row:
                raise RowError(
                    name, "it has no margin, but other rows have one", "Add it, or drop the column", "no margin"
                )
            if self.stage != "sft":
                self._join_captions(row, paths)
        except RowError as error:
            empty: dict[str, Any] = {column: [] for column in ("images", "prompt", *COMPLETIONS[self.stage])}
            return {"row_name": name, **empty, "_reason": error.reason, "_problem": error.problem, "_fix": error.fix}
        carried = {column: record.get(column) for column in self.features if column not in KNOWN_COLUMNS}
        for column, value in carried.items():
            if value is not None and self.is_json and self.features[column] == Value("string"):
                carried[column] = str(value)  # the column's types were mixed
        return {**carried, **row}

    def _parsed(self, text: str, row_name: str) -> dict[str, Any]:
        try:
            record = json_record(text)
        except ValueError as error:
            raise RowError(row_name, f"it is not JSON ({error})", "Correct the line", "not JSON") from error
        if not isinstance(record, dict):
            raise RowError(row_name, f"it is a JSON {type(record).__name__}, expected an object", "Correct the row")
        return {key: value for key, value in record.items() if self.columns is None or key in self.columns}

    def _reference(self, image: Any, row_name: str) -> dict[str, Any]:
        """`{"bytes", "path"}` of an image, which can be opened from any working directory."""
        if isinstance(image, bytes):
            return {"bytes": image, "path": None}
        path, placed = _path_of(image), isinstance(image, dict)
        if placed and isinstance(image.get("bytes"), bytes):
            return {"bytes": image["bytes"], "path": path}
        if not isinstance(path, str) or not path:
            problem = f"an image is {abridged(image)}, expected a file name or image data"
            raise RowError(row_name, problem, "Correct the row", "image missing")
        if self.fetch_images and is_url(path):
            return {"bytes": fetch(path, row_name), "path": path}
        check_is_a_name(path, row_name)
        if self.trusted_paths or (placed and not self.is_json and _in_cache(path)):
            found = path
        elif self.image_folder is not None:
            found = path_inside(self.image_folder, path, row_name)
        else:
            problem = f"its image is the file name {path!r}"
            raise RowError(row_name, problem, "Set image_folder to the folder it is in", "no folder")
        return {"bytes": None, "path": str(Path(found).absolute())}

    def _join_captions(self, row: dict[str, Any], paths: list[Any]) -> None:
        name = row["row_name"]
        if self.captions_file is not None and paths:
            if row["captions"]:
                raise RowError(name, "it has captions, and captions_file is set", "Keep one of them", "captions twice")
            lettered = row.get("answer_type") in ("A", "B", "C", "D")
            for path in paths:
                row["captions"] += captions_of(str(self.captions_file), path or "", name, multiple_choice=lettered)
        if self.require_captions:
            check_captions(row["captions"], name)


def _check_columns(columns: Iterable[str], known: frozenset[str], name: str, captions_column: str) -> None:
    if captions_column not in ("captions", *columns):
        problem = f"it has no column {captions_column!r}, only {sorted(columns)}"
        raise RowError(name, problem, "Correct captions_column")
    fix = "Rename or remove the column"
    for column in columns:
        if column in RESERVED_COLUMNS - known:
            raise RowError(name, f"it has a column {column!r}, a name that is used here", fix)
        close = get_close_matches(column.lower(), known, n=1, cutoff=0.87)
        if close and column not in known and column != captions_column:
            fix += f", or set captions_column to {column!r}" if close[0] == "captions" else ""
            raise RowError(name, f"it has an unknown column {column!r}; did you mean {close[0]!r}?", fix)


def _path_of(image: Any) -> Any:
    """The name by which a record, and so the captions file, knows an image."""
    if isinstance(image, bytes):
        return None
    return image.get("path") if isinstance(image, dict) else image


def _in_cache(path: str) -> bool:
    """Whether `datasets` or the Hub's client has placed a file, so that its name is not the data set's word for it."""
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return any(is_inside(path, cache) for cache in caches)
