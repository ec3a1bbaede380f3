"""One record of a data set to one row: its format turned, its images found and checked, its captions joined."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Features, Value
from huggingface_hub import constants

from trl_llava.data.captions import captions_of, read_captions
from trl_llava.data.contract import ANSWERS, RowError, Stage
from trl_llava.data.formats import KNOWN_COLUMNS, to_row
from trl_llava.data.images import is_inside, load_image, open_image, path_inside
from trl_llava.data.sources import JSON_COLUMN, RawRows, json_record

PROBLEM_COLUMNS = ("_reason", "_problem", "_fix")
"""What is wrong with a row, as in `RowError`; empty for a row that can be used."""


def in_cache(path: str) -> bool:
    """Whether `datasets` or the Hub's client has placed a file, so that its name is not the data set's word for it.

    Args:
        path: Of a picture that a data set refers to.

    Returns:
        True if it is in one of their caches.
    """
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return any(is_inside(path, cache) for cache in caches)


class RowMaker:
    """Turns batches of records into rows; runs in worker processes, so it holds only what travels cheaply."""

    def __init__(
        self,
        raw: RawRows,
        stage: Stage,
        image_folder: str | Path | None,
        captions_file: str | Path | None,
        require_captions: bool,
        decode: bool,
        features: Features,
    ) -> None:
        self.name, self.is_json, self.columns = raw.name, raw.is_json, raw.columns
        self.trusted_paths = raw.trusted_paths
        self.stage, self.features = stage, features
        self.image_folder = str(image_folder) if image_folder is not None else None
        self.captions_file = str(captions_file) if captions_file is not None else None
        self.require_captions, self.decode = require_captions, decode
        if self.captions_file is not None:
            read_captions(self.captions_file)  # a broken file is reported once, not by every worker

    def __call__(self, table: pa.Table, indices: list[int]) -> dict[str, list[Any]]:
        records = table.to_pylist()
        rows = [self.row(record, index) for record, index in zip(records, indices, strict=True)]
        return {name: [row.get(name) for row in rows] for name in [*self.features, *PROBLEM_COLUMNS]}

    def row(self, record: dict[str, Any], index: int) -> dict[str, Any]:
        name = f"{self.name}[{record['index'] if self.is_json else index}]"
        try:
            if self.is_json:
                record = self.parsed(record[JSON_COLUMN], name)
            name = record.get("row_name") or name
            row = to_row(record, self.stage, name)
            image_names = [self.place(row["images"], i, name) for i in range(len(row["images"]))]
            for ref in row["images"]:
                (load_image if self.decode else open_image)(ref, name)
            if self.stage != "sft":
                self.join_captions(row, record, image_names)
        except RowError as error:
            empty: dict[str, Any] = {column: [] for column in ("images", "prompt", *ANSWERS[self.stage])}
            return {"row_name": name, **empty, "_reason": error.reason, "_problem": error.problem, "_fix": error.fix}
        carried = {column: record.get(column) for column in self.features if column not in KNOWN_COLUMNS}
        for column, value in carried.items():
            if value is not None and self.is_json and self.features[column] == Value("string"):
                carried[column] = str(value)  # the column's types were mixed
        return {**carried, **row}

    def parsed(self, text: str, row_name: str) -> dict[str, Any]:
        try:
            record = json_record(text)
        except ValueError as error:
            raise RowError(row_name, f"it is not JSON ({error})", "Correct the line", "not JSON") from error
        if not isinstance(record, dict):
            raise RowError(row_name, f"it is a JSON {type(record).__name__}, expected an object", "Correct the row")
        return {key: value for key, value in record.items() if self.columns is None or key in self.columns}

    def place(self, images: list[Any], i: int, row_name: str) -> str | None:
        """Make `images[i]` a reference that can be opened from anywhere; return the name captions know it by."""
        ref = images[i]
        path = ref.get("path") if isinstance(ref, dict) else ref
        if isinstance(ref, dict) and isinstance(ref.get("bytes"), bytes):
            images[i] = {"bytes": ref["bytes"], "path": path}
            return path
        if not isinstance(path, str) or not path:
            raise RowError(
                row_name,
                f"an image is {ref!r}, expected a file name or a picture",
                "Correct the row",
                "image missing",
            )
        if self.trusted_paths or (isinstance(ref, dict) and not self.is_json and in_cache(path)):
            found = path
        elif self.image_folder is not None:
            found = path_inside(self.image_folder, path, row_name)
        else:
            raise RowError(
                row_name,
                f"its image is the file name {path!r}",
                "Set image_folder to the folder it is in",
                "no folder",
            )
        images[i] = {"bytes": None, "path": str(Path(found).absolute())}
        return path

    def join_captions(self, row: dict[str, Any], record: dict[str, Any], image_names: list[str | None]) -> None:
        if self.captions_file is not None and image_names:
            if row["captions"]:
                raise RowError(
                    row["row_name"], "it has captions, and captions_file is set", "Keep one of them", "captions twice"
                )
            lettered = row.get("answer_type") in ("A", "B", "C", "D")
            for image_name in image_names:
                row["captions"] += captions_of(
                    self.captions_file, image_name or "", row["row_name"], multiple_choice=lettered
                )
        if self.require_captions and not row["captions"]:
            raise RowError(
                row["row_name"],
                "it has no captions, but the judging prompt shows them",
                "Give a `captions` column or captions_file, or set with_captions to false for the reward model",
                "no captions",
            )
