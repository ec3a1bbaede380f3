"""Data sets to rows: everything that can be named in a recipe, or handed to a trainer, becomes rows of one contract.

`sources.py` finds and reads a data set, `row_maker.py` makes one row of one record; here that is done for every
record, and what cannot be used is refused or counted.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from datasets import Dataset, Features, Value

from trl_llava.data.contract import TIE, RowError, Stage, is_normalised
from trl_llava.data.row_maker import PROBLEM_COLUMNS, RowMaker
from trl_llava.data.sources import DatasetSource, RawRows, read_source
from trl_llava.errors import InputError

logger = logging.getLogger(__name__)


def load_rows(
    source: str | Path | DatasetSource | RawRows,
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
    captions_column: str = "captions",
    rating: str | None = None,
    fetch_images: bool = False,
) -> Dataset:
    """Load a data set as normalised rows.

    Args:
        source: A Hub ID, a `.json`, `.jsonl` or `.parquet` file, a folder with such files, an image folder with
            `metadata.jsonl`, a data set saved with `save_to_disk`, or an entry of TRL's `datasets` mixture (read for
            its `path`, `name`, `split`, `data_dir`, `data_files` and `columns`); or what `read_source` gave.
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
        captions_column: Column with the captions, a text or a list of texts; facts of any kind will do.
        rating: Which rating orders a row's completions where there are several; pairs are made of the best and the
            worst one. Pairs on a level are left out and counted. None is the usual one: "Visual Faithfulness" of
            VLFeedback, "final_ranking" of MM-RLHF.
        fetch_images: Fetch images that are URLs; otherwise they are refused.

    Returns:
        The rows, with `row_name` pointing into the source.

    Raises:
        RowError: If a row cannot be used and `on_bad_row` is `error`, if the data set is empty or none of its rows can
            be used, or if a column looks misspelt.
        FileNotFoundError: If a path does not exist.
        ValueError: If the files are no data set.

    Example:
        >>> rows = load_rows("openbmb/RLAIF-V-Dataset", "preference", split="train", on_bad_row="skip")
        >>> sorted(rows.column_names)
        ['captions', 'chosen', 'images', 'prompt', 'rejected', 'row_name']
    """
    _check_policy(on_bad_row)
    raw = source if isinstance(source, RawRows) else read_source(source, name=name, split=split, revision=revision)
    folder = image_folder or raw.image_folder
    maker = RowMaker.of(
        raw,
        stage,
        folder,
        captions_file,
        require_captions,
        decode=on_bad_row == "skip",
        captions_column=captions_column,
        rating=rating,
        fetch_images=fetch_images,
    )
    return _make_rows(raw, maker, on_bad_row, num_proc)


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
    captions_column: str = "captions",
    rating: str | None = None,
    fetch_images: bool = False,
) -> Dataset:
    """Normalise a data set in memory; one that follows the row contract already is returned as it is.

    Args:
        dataset: Rows in one of the formats of `formats.to_row`.
        stage: Which stage will read the rows.
        name: What errors call the data set: row 17 is `name[17]`.
        image_folder: Where image file names are looked up; by default they are paths.
        captions_file: As in `load_rows`.
        on_bad_row: As in `load_rows`.
        require_captions: As in `load_rows`.
        num_proc: As in `load_rows`.
        captions_column: As in `load_rows`.
        rating: As in `load_rows`.
        fetch_images: As in `load_rows`.

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
    _check_policy(on_bad_row)
    as_given = image_folder is None and captions_file is None and captions_column == "captions"
    unchanged = as_given and is_normalised(dataset.features, stage)
    if stage == "preference" and "margin" in dataset.column_names:
        unchanged = unchanged and None not in dataset["margin"][:]
    if len(dataset) and unchanged and (not require_captions or all(dataset["captions"])):
        return dataset
    raw = RawRows(dataset, name, trusted_paths=image_folder is None)
    maker = RowMaker.of(
        raw,
        stage,
        image_folder,
        captions_file,
        require_captions,
        decode=on_bad_row == "skip",
        captions_column=captions_column,
        rating=rating,
        fetch_images=fetch_images,
    )
    return _make_rows(raw, maker, on_bad_row, num_proc)


def _check_policy(on_bad_row: str) -> None:
    if on_bad_row not in ("error", "skip"):
        raise InputError(f"on_bad_row is {on_bad_row!r}, expected `error` or `skip`.")


def _make_rows(raw: RawRows, maker: RowMaker, on_bad_row: str, num_proc: int | None) -> Dataset:
    if maker.unread:
        logger.warning(
            "%s: the %s stage does not read the columns %s.", raw.name, maker.stage, ", ".join(maker.unread)
        )
    rows = raw.dataset.with_format("arrow").map(
        maker.batch,
        batched=True,
        batch_size=200,
        with_indices=True,
        remove_columns=raw.dataset.column_names,
        features=Features({**maker.features, **dict.fromkeys(PROBLEM_COLUMNS, Value("string"))}),
        num_proc=num_proc,
        # The result depends on files (images, captions) that the cache's key does not see.
        load_from_cache_file=False,
        desc=f"Checking {raw.name}",
    )
    return _without_bad_rows(rows.with_format(None), raw.name, on_bad_row)


def _without_bad_rows(rows: Dataset, name: str, on_bad_row: str) -> Dataset:
    reasons = rows["_reason"][:]
    bad = [i for i, reason in enumerate(reasons) if reason is not None]
    faulty = [i for i in bad if reasons[i] != TIE]
    if bad and ((on_bad_row == "error" and faulty) or len(bad) == len(rows)):
        first = rows[(faulty or bad)[0]]
        more = f" ({len(bad)} of {len(rows)} rows cannot be used: {_counted(reasons)})" if len(bad) > 1 else ""
        hinted = "on_bad_row" in first["_fix"] or len(bad) == len(rows)
        hint = "" if hinted else "; on_bad_row `skip` leaves such rows out"
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
