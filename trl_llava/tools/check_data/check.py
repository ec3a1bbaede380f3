"""One batch of records checked as a run would meet them, for `trl-llava check-data`."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets import Features, Value

from trl_llava.data.contract import RowError
from trl_llava.data.lengths import LengthMeter
from trl_llava.data.maker import RowMaker

FOUND = Features(
    {
        **dict.fromkeys(("reason", "problem", "answer_type"), Value("string")),
        **dict.fromkeys(("images", "captions", "tokens", "text_tokens"), Value("int32")),
        "encoded": Value("bool"),
    }
)
"""What is kept of each row: numbers and reasons only, so that memory stays flat."""


class RowCheck:
    """Checks batches of records, in worker processes.

    Args:
        make_rows: Makes a row of each record, its images decoded.
        meter: Counts the tokens of a row.
    """

    def __init__(self, make_rows: RowMaker, meter: LengthMeter) -> None:
        self.make_rows, self.meter = make_rows, meter

    def __call__(self, table: pa.Table, indices: list[int]) -> dict[str, list[Any]]:
        records = zip(table.to_pylist(), indices, strict=True)
        found = list(self.findings([self.make_rows.row(record, index) for record, index in records]))
        return {name: [finding[name] for finding in found] for name in FOUND}

    def findings(self, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One dict with the keys of `FOUND` for each row."""
        for row, problem, (tokens, text_tokens) in zip(rows, *self.measured(rows), strict=True):
            reason = row.get("_reason") or (problem.reason if problem else None)
            stated = f"{row['row_name']}: {row['_problem']}. {row['_fix']}." if row.get("_reason") else None
            yield {
                "reason": reason,
                "problem": stated or (str(problem) if problem else None),
                "answer_type": row.get("answer_type"),
                "images": len(row["images"]),
                "captions": len(row.get("captions") or []),
                "tokens": tokens,
                "text_tokens": text_tokens,
                "encoded": problem is None,
            }

    def measured(self, rows: list[dict[str, Any]]) -> tuple[list[RowError | None], list[tuple[int, int]]]:
        """What keeps each row from being encoded, and its tokens; rows that are wrong before that count none."""
        usable = [i for i, row in enumerate(rows) if not row.get("_reason")]
        problems: list[RowError | None] = [None] * len(rows)
        lengths = [(0, 0)] * len(rows)
        if not usable:
            return problems, lengths
        try:
            for i, length in zip(usable, self.meter.measure([rows[i] for i in usable]), strict=True):
                lengths[i] = length
        except ValueError:  # one of them: which one?
            for i in usable:
                try:
                    (lengths[i],) = self.meter.measure([rows[i]])
                except RowError as error:
                    problems[i] = error
                except ValueError as error:
                    problems[i] = RowError(rows[i]["row_name"], str(error), "Correct the recipe", "cannot be rendered")
        return problems, lengths
