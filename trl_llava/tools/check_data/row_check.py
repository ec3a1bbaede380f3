"""One batch of records checked as a run would meet them, for `trl-llava check-data`."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Features, Value

from trl_llava.data.contract import RowError, check_one_image
from trl_llava.data.image_places import text_before_image
from trl_llava.data.lengths import LengthMeter
from trl_llava.data.row_maker import RowMaker

FOUND = Features(
    {
        **dict.fromkeys(("reason", "problem", "answer_type"), Value("string")),
        **dict.fromkeys(("images", "captions", "tokens", "text_tokens"), Value("int32")),
        "text_first": Value("bool"),  # an image of its prompt stands after text
        "loaded": Value("bool"),  # False for a row that a run refuses, or skips, before it encodes any
    }
)
"""What is kept of each row: numbers and reasons only, so that memory stays flat."""


@dataclass
class RowCheck:
    """Makes rows, their images decoded, and counts their tokens, in worker processes.

    `one_image_for` names who would read several images of a row one by one; None if no one.
    """

    maker: RowMaker
    meter: LengthMeter
    one_image_for: str | None

    def batch(self, table: pa.Table, indices: list[int]) -> dict[str, list[Any]]:
        """Columns as in `FOUND` of one batch, for `Dataset.map` in Arrow format."""
        rows = [self.maker.row(record, index) for record, index in zip(table.to_pylist(), indices, strict=True)]
        refused = [
            RowError(row["row_name"], row["_problem"], row["_fix"], row["_reason"]) if row.get("_reason") else None
            for row in rows
        ]
        problems = list(refused)
        lengths = self._measure(rows, problems)
        return {
            "reason": [problem and problem.reason for problem in problems],
            "problem": [problem and str(problem) for problem in problems],
            "answer_type": [row.get("answer_type") for row in rows],
            "images": [len(row["images"]) for row in rows],
            "captions": [len(row.get("captions") or []) for row in rows],
            "tokens": [tokens for tokens, _ in lengths],
            "text_tokens": [text_tokens for _, text_tokens in lengths],
            "text_first": [text_before_image(row["prompt"]) for row in rows],
            "loaded": [problem is None for problem in refused],
        }

    def _measure(self, rows: list[dict[str, Any]], problems: list[RowError | None]) -> list[tuple[int, int]]:
        """Tokens of each row, (0, 0) for one that cannot be used; adds to `problems` what keeps rows from encoding."""
        lengths = [(0, 0)] * len(rows)
        loaded = [i for i, problem in enumerate(problems) if problem is None]
        try:
            for i in loaded if self.one_image_for else ():
                check_one_image(rows[i]["images"], rows[i]["row_name"], str(self.one_image_for))
            measured = self.meter.measure([rows[i] for i in loaded]) if loaded else []
            for i, length in zip(loaded, measured, strict=True):
                lengths[i] = length
        except ValueError as error:
            if len(rows) > 1:  # which one of them?
                for i, row in enumerate(rows):
                    own = problems[i : i + 1]
                    (lengths[i],) = self._measure([row], own)
                    problems[i] = own[0]
            elif isinstance(error, RowError):
                problems[0] = error
            else:
                problems[0] = RowError(rows[0]["row_name"], str(error), "Correct the recipe", "cannot be rendered")
        return lengths
