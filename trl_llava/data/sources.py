"""Where a data set is: found by Hub ID or path, and read without decoding an image."""

import functools
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, ReadInstruction, Value, load_dataset, load_from_disk

from trl_llava.errors import InputError, NotFoundError
from trl_llava.hub.lookup import place_of_data
from trl_llava.hub.names import split_revision

JSON_COLUMN = "json"
"""Column with one record as JSON text: records with different keys and types stand side by side."""


class DatasetSource(Protocol):
    """What `load_rows` reads of TRL's `DatasetConfig`."""

    path: str
    name: str | None
    data_dir: str | None
    data_files: str | list[str] | dict[str, str] | None
    split: str
    columns: list[str] | None


@dataclass
class RawRows:
    """A data set as found; `name` is what errors call it."""

    dataset: Dataset
    name: str
    is_json: bool = False  # then each record is a JSON text, and the columns are `index` and `json`
    columns: list[str] | None = None  # to read of JSON records, None for all
    image_folder: str | None = None  # where its image file names are looked up, if it knows
    trusted_paths: bool = False  # image paths come from the caller or from `datasets` itself, not from the data


def read_source(
    source: str | Path | DatasetSource, *, name: str | None = None, split: str = "train", revision: str | None = None
) -> RawRows:
    """Find and read a data set, nothing checked yet; the arguments are those of `load_rows`.

    Of an entry of a mixture its own `name` and `split` count.
    """
    columns = None
    options: dict[str, Any] = {"revision": revision}
    if not isinstance(source, (str, Path)):
        name, split, columns = source.name, source.split, source.columns
        options.update(data_dir=source.data_dir, data_files=source.data_files)
        source = source.path
    source, options["revision"] = split_revision("the data set", str(source), revision)
    path = Path(source).expanduser()
    if path.is_dir() and not any(options.values()):
        raw = _read_folder(path, name, split)
    elif path.is_file():
        if name:
            raise InputError(f"{path} is a file, which has no configuration {name!r}: leave `dataset_config` out.")
        raw = _read_file(path, split)
    elif path.suffix.lower() in (".json", ".jsonl", ".parquet") or str(source).startswith((".", "/", "~")):
        raise NotFoundError(f"The data set {source} does not exist. Expected a Hub ID, a file or a folder.")
    else:
        try:
            files = {key: value for key, value in options.items() if key != "revision" and value is not None}
            place = place_of_data(source, name, options["revision"], files)
            raw = RawRows(load_dataset(**place, split=split), source)
        except (OSError, ValueError) as error:  # not there or no network; no such configuration or split
            what = f"configuration {name}, split {split}"
            what += f", revision {options['revision']}" if options["revision"] else ""
            raise NotFoundError(
                f"The data set {source} cannot be loaded ({what}). Expected a Hub ID, a file or a folder; without "
                f"network, one that is in the cache. The cause: {error}"
            ) from error
    if columns is not None and raw.is_json:
        raw.columns = columns
    elif columns is not None:
        raw.dataset = raw.dataset.select_columns(columns)
    return raw


def json_record(text: str) -> Any:
    """Read one JSON text.

    What JSON can write as an escape and no data set can hold is a `ValueError` too: half of a surrogate pair (texts
    that were cut in an emoji have it), or NUL in a key.
    """
    try:
        record = json.loads(text, object_pairs_hook=_without_nul if "\\u0000" in text else None)
    except RecursionError as error:
        raise ValueError("lists in lists beyond measure") from error
    if "\\ud" in text.lower():
        json.dumps(record, ensure_ascii=False).encode()
    return record


def _without_nul(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if any("\0" in key for key, _ in pairs):
        raise ValueError("a key holds NUL")
    return dict(pairs)


def json_columns(raw: RawRows, untyped: Container[str] = ()) -> Features:
    """Every key of JSON records with its type; a column whose values have no common type becomes text.

    Of the `untyped` columns, most of the data set, no value is kept to find a type that nobody asks for.
    """
    values: dict[str, list[Any]] = {}
    for text in raw.dataset[JSON_COLUMN]:
        try:
            record = json_record(text)
        except ValueError:
            continue  # reported, with its row, when the rows are made
        for key, value in record.items() if isinstance(record, dict) else ():
            if raw.columns is None or key in raw.columns:
                column = values.setdefault(key, [])
                if key not in untyped:
                    column.append(value)
    return Features({key: _feature(column) for key, column in values.items()})


def has_numbers(raw: RawRows, column: str) -> bool:
    """Whether a column has a number in any row; one of nulls only counts as none."""
    values = (
        map(functools.partial(_value, column=column), raw.dataset[JSON_COLUMN]) if raw.is_json else raw.dataset[column]
    )
    return any(isinstance(value, (int, float)) for value in values)


def _value(text: str, column: str) -> Any:
    try:
        record = json_record(text) if f'"{column}"' in text else None
    except ValueError:
        return None  # reported, with its row, when the rows are made
    return record.get(column) if isinstance(record, dict) else None


def _feature(values: list[Any]) -> Any:
    try:
        kind = pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return Value("string")
    return Features.from_arrow_schema(pa.schema({"value": kind}))["value"]


def _read_folder(folder: Path, name: str | None, split: str) -> RawRows:
    base = split.split("[")[0]
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        dataset = load_from_disk(str(folder))
        if isinstance(dataset, DatasetDict):
            if base not in dataset:
                raise InputError(f"{folder} has no split {base!r}, only {sorted(dataset)}.")
            dataset = dataset[base]
        return RawRows(_slice(dataset, split, base, folder), folder.name, trusted_paths=True)
    for metadata in (folder / base / "metadata.jsonl", folder / "metadata.jsonl"):
        if metadata.exists():
            return _read_json(metadata, split, base)
    files = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    of_split = [file for file in files if file.stem == base]
    if files:
        if len(of_split) != 1 and not (len(files) == 1 and base == "train"):
            raise InputError(
                f"{folder} has the files {[file.name for file in files]}, expected one {base}.json or {base}.jsonl. "
                "Name the file itself."
            )
        return _read_json((of_split or files)[0], split, base)
    return RawRows(load_dataset(str(folder), name, split=split), folder.name, trusted_paths=True)


def _read_file(path: Path, split: str) -> RawRows:
    if path.suffix.lower() in (".json", ".jsonl"):
        return _read_json(path, split, "train")
    if path.suffix.lower() == ".parquet":
        return RawRows(load_dataset("parquet", data_files={"train": str(path)}, split=split), path.name)
    raise InputError(f"{path} is no data set that can be read: expected .json, .jsonl or .parquet.")


def _read_json(path: Path, split: str, splitname: str) -> RawRows:
    try:
        texts = list(_json_texts(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}). Save it in that encoding.") from error
    if path.name == "metadata.jsonl":
        texts = [_named_as_image(text) for text in texts]
    dataset = Dataset.from_dict(
        {"index": list(range(len(texts))), JSON_COLUMN: texts},
        features=Features({"index": Value("int64"), JSON_COLUMN: Value("large_string")}),
    )
    return RawRows(_slice(dataset, split, splitname, path), path.name, is_json=True, image_folder=str(path.parent))


def _json_texts(path: Path) -> Iterator[str]:
    """Yield the records of a JSON list or of JSON lines, whatever the file is called."""
    with path.open(encoding=_encoding(path)) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start != "[":
            yield from _objects([line for line in file if line.strip()])
            return
        try:
            records = json.load(file)
        except (ValueError, RecursionError) as error:
            expected = "Expected a list of records, or one on each line."
            raise InputError(f"{path} is not JSON ({error}). {expected}") from error
    yield from (json.dumps(record) for record in records)


def _encoding(path: Path) -> str:
    """UTF-8, or what Windows writes with a mark at the front."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _objects(lines: list[str]) -> list[str]:
    """The lines, or the objects that run over several of them; what is neither is said line by line."""
    if not lines or _is_json(lines[0]):
        return lines
    text, found, at = "".join(lines).strip(), [], 0
    while at < len(text):
        try:
            _, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            return lines
        found.append(text[at:end])
        at = next((i for i in range(end, len(text)) if not text[i].isspace()), len(text))
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _named_as_image(text: str) -> str:
    """Rename the columns by which an image folder's metadata name their images."""
    try:
        record = json_record(text)
    except ValueError:
        return text  # reported, with its row, when the rows are made
    if not isinstance(record, dict):
        return text
    names = {"file_name": "image", "file_names": "images"}
    return json.dumps({names.get(key, key): value for key, value in record.items()})


def _slice(dataset: Dataset, split: str, splitname: str, path: Path) -> Dataset:
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({splitname: len(dataset)})
    except ValueError as error:
        raise InputError(
            f"{path} has no split {split!r}, which `dataset_train_split`, `dataset_test_split` or an entry's `split` "
            f"names: it is {splitname!r} ({error})."
        ) from error
    wanted = [i for part in parts for i in range(part.from_ or 0, len(dataset) if part.to is None else part.to)]
    return dataset if len(wanted) == len(dataset) else dataset.select(wanted)
