"""Data sets to rows: everything that can be named in a recipe, or handed to a trainer, becomes rows of one contract.

`rows/sources.py` finds and reads a data set, `rows/maker.py` makes one row of one record; here that is done for every
record, and what cannot be used is refused or counted.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from datasets import Dataset, Features, Value

from trl_llava.data.contract import RowError, Stage, is_normalised, stage_features
from trl_llava.data.formats import KNOWN_COLUMNS
from trl_llava.data.images import load_image
from trl_llava.data.maker import PROBLEM_COLUMNS, RowMaker
from trl_llava.data.sources import DatasetSource, RawRows, json_columns, read_source
from trl_llava.errors import InputError

__all__ = ["RowError", "load_image", "load_rows", "rows_from"]

RESERVED_COLUMNS = frozenset({*PROBLEM_COLUMNS, "prompts", "completions", "completion_ids"})
"""Columns that a data set cannot have: those that rows are checked with, and what reward functions get beside it."""

logger = logging.getLogger(__name__)


def load_rows(
    source: str | Path | DatasetSource,
    stage: Stage,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    image_folder: str | Path | None = None,
    captions_file: str | Path | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    require_captions: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Load a data set as normalised rows.

    Args:
        source: A Hub ID, a `.json`, `.jsonl` or `.parquet` file, a folder with such files, an image folder with
            `metadata.jsonl`, a data set saved with `save_to_disk`, or an entry of TRL's `datasets` mixture (read for
            its `path`, `name`, `split`, `data_dir`, `data_files` and `columns`).
        stage: Which stage will read the rows.
        name: Configuration of a Hub data set.
        split: Which split; slices such as `train[:500]` work.
        revision: Commit or branch of a Hub data set.
        image_folder: Where image file names are looked up; by default the folder of a JSON file.
        captions_file: JSON file with `{image name: [captions]}`.
        on_bad_row: `error` stops at the first row that cannot be used; `skip` leaves such rows out, decodes every
            image once to find damaged ones, and logs how many rows went for which reason.
        require_captions: Whether a row without captions cannot be used (preference and prompt stages).
        num_proc: Processes to work with.

    Returns:
        The rows, with `row_name` pointing into the source.

    Raises:
        RowError: If a row cannot be used and `on_bad_row` is `error`, if the data set is empty or none of its rows can
            be used, or if a column looks misspelt.
        FileNotFoundError: If a path does not exist.
        ValueError: If the files are no data set.
    """
    raw = read_source(source, name=name, split=split, revision=revision)
    return _normalise(
        raw, stage, image_folder or raw.image_folder, captions_file, on_bad_row, require_captions, num_proc
    )


def rows_from(
    dataset: Dataset,
    stage: Stage,
    *,
    name: str = "dataset",
    image_folder: str | Path | None = None,
    captions_file: str | Path | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    require_captions: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Normalise a data set in memory; one that follows the row contract already is returned as it is.

    Args:
        dataset: Rows in one of the formats of `row_formats.to_row`.
        stage: Which stage will read the rows.
        name: What errors call the data set: row 17 is `name[17]`.
        image_folder: Where image file names are looked up; by default they are paths.
        captions_file: As in `load_rows`.
        on_bad_row: As in `load_rows`.
        require_captions: As in `load_rows`.
        num_proc: As in `load_rows`.

    Returns:
        The rows.

    Raises:
        RowError: As in `load_rows`.
        TypeError: If it is no `datasets.Dataset`: a stream cannot be checked before training starts.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}, expected a datasets.Dataset. Choose a split of a DatasetDict; "
            "streamed data sets are not supported, because their rows cannot be checked before training."
        )
    options_given = image_folder is not None or captions_file is not None or require_captions
    if len(dataset) and is_normalised(dataset.features, stage) and not options_given:
        return dataset
    raw = RawRows(dataset, name, trusted_paths=image_folder is None)
    return _normalise(raw, stage, image_folder, captions_file, on_bad_row, require_captions, num_proc)


def row_maker(
    raw: RawRows,
    stage: Stage,
    image_folder: str | Path | None,
    captions_file: str | Path | None,
    require_captions: bool,
    *,
    decode: bool,
) -> RowMaker:
    """Make what turns the records of a data set into rows.

    Args:
        raw: The data set as found.
        stage: As in `load_rows`.
        image_folder: As in `load_rows`; here it must be known.
        captions_file: As in `load_rows`.
        require_captions: As in `load_rows`.
        decode: Whether images are decoded to find damaged ones, or only opened.

    Returns:
        The maker; it takes batches for `Dataset.map` in Arrow format with indices.

    Raises:
        RowError: If the data set is empty, or a column looks misspelt.
    """
    if not len(raw.dataset):
        raise RowError(raw.name, "it is empty, expected at least one row", "Check the file and the split", "empty")
    columns = json_columns(raw, KNOWN_COLUMNS) if raw.is_json else dict(raw.dataset.features)
    _check_columns(columns, raw.name)
    carried = {name: feature for name, feature in columns.items() if name not in KNOWN_COLUMNS}
    if carried and stage != "prompt":
        logger.info("%s: the %s stage does not read the columns %s.", raw.name, stage, ", ".join(sorted(carried)))
        carried = {}
    features = Features({**stage_features(stage, margin=stage == "preference" and "margin" in columns), **carried})
    return RowMaker(raw, stage, image_folder, captions_file, require_captions, decode, features)


def _normalise(
    raw: RawRows,
    stage: Stage,
    image_folder: str | Path | None,
    captions_file: str | Path | None,
    on_bad_row: str,
    require_captions: bool,
    num_proc: int | None,
) -> Dataset:
    if on_bad_row not in ("error", "skip"):
        raise InputError(f"on_bad_row is {on_bad_row!r}, expected `error` or `skip`.")
    make_rows = row_maker(raw, stage, image_folder, captions_file, require_captions, decode=on_bad_row == "skip")
    checked = Features({**make_rows.features, **dict.fromkeys(PROBLEM_COLUMNS, Value("string"))})
    rows = raw.dataset.with_format("arrow").map(
        make_rows,
        batched=True,
        batch_size=200,
        with_indices=True,
        remove_columns=raw.dataset.column_names,
        features=checked,
        num_proc=num_proc,
        # The result depends on files (pictures, captions) that the cache's key does not see.
        load_from_cache_file=False,
        desc=f"Checking {raw.name}",
    )
    return _without_bad_rows(rows.with_format(None), raw.name, on_bad_row)


def _check_columns(columns: Iterable[str], name: str) -> None:
    for column in columns:
        if column in KNOWN_COLUMNS:
            continue
        if column in RESERVED_COLUMNS:
            raise RowError(
                name, f"it has a column {column!r}, a name that is used here", "Rename or remove the column"
            )
        close = get_close_matches(column.lower(), KNOWN_COLUMNS, n=1, cutoff=0.87)
        if close:
            raise RowError(
                name, f"it has an unknown column {column!r}; did you mean {close[0]!r}?", "Rename or remove the column"
            )


def _without_bad_rows(rows: Dataset, name: str, on_bad_row: str) -> Dataset:
    reasons = rows["_reason"][:]
    bad = [i for i, reason in enumerate(reasons) if reason is not None]
    if bad and (on_bad_row == "error" or len(bad) == len(rows)):
        first = rows[bad[0]]
        more = f" ({len(bad)} of {len(rows)} rows cannot be used: {_counted(reasons)})" if len(bad) > 1 else ""
        said = "on_bad_row" in first["_fix"] or len(bad) == len(rows)
        hint = "" if said else "; on_bad_row `skip` leaves such rows out"
        raise RowError(first["row_name"], first["_problem"] + more, first["_fix"] + hint, first["_reason"])
    if bad:
        names = rows["row_name"]
        examples = {reasons[i]: names[i] for i in reversed(bad)}
        logger.warning("Skipped %d of %d rows of %s: %s.", len(bad), len(rows), name, _counted(reasons, examples))
        rows = rows.select([i for i, reason in enumerate(reasons) if reason is None])
    return rows.remove_columns(list(PROBLEM_COLUMNS))


def _counted(reasons: Sequence[str | None], examples: dict[str, str] | None = None) -> str:
    """How many rows have each reason, the most frequent first, each with its example where there is one."""
    counts = Counter(reason for reason in reasons if reason is not None).most_common()
    named = {reason: f" ({row_name})" for reason, row_name in (examples or {}).items()}
    return ", ".join(f"{count} {reason}{named.get(reason, '')}" for reason, count in counts)
