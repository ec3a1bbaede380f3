"""The row contract: what a row holds, and the error that names one.

One record is one row; nothing runs beside it in another list. A normalised row has

- `row_name` (str): where it comes from, `train.json[17]`; every error about the row begins with it.
- `images` (list): `{"bytes", "path"}` references, decoded when a batch is made; empty for a text-only row.
- messages, by stage: sft `prompt` and `completion`; preference `prompt`, `chosen` and `rejected`; prompt `prompt`. A
  message's content is always a list of parts; an image part is the only markup, the characters `<image>` inside a
  text part are text.
- `captions` (list of str; preference, prompt), `answer_type` and `length_multiplier` (prompt), `margin` where given.
"""


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        row_name: The row, such as `train.json[17]`.
        problem: What was expected and what was found.
        fix: What to do about it.

    Example:
        >>> print(RowError("train.json[17]", "preference is 3, expected 1 or 2", "Correct the row"))
        train.json[17]: preference is 3, expected 1 or 2. Correct the row.
    """

    def __init__(self, row_name: str, problem: str, fix: str) -> None:
        super().__init__(row_name, problem, fix)  # all three, so that a worker process can pickle it
        self.row_name = row_name
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.row_name}: {self.problem}. {self.fix}."
