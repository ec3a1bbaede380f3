"""What `trl-llava check-data` prints: tables of rows, problems and lengths."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_llava.data.image_places import MOVED

MISSING = ("image missing", "no folder", "image outside its folder", "image is a URL", "image not fetched")
UNREADABLE = ("damaged image", "empty image", "image too large", "unknown pixel range")
BARS = 12


@dataclass
class SourceReport:
    """What was found in one data set."""

    name: str
    rows: int = 0
    usable: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # of the rows that cannot be used
    examples: dict[str, str] = field(default_factory=dict)  # the first row of each reason, with fix
    unread: tuple[str, ...] = ()  # columns that the stage does not read
    has_margin: bool = False
    answer_types: Counter[str] = field(default_factory=Counter)  # of usable rows
    text_only: int = 0  # usable rows without images
    without_captions: int = 0
    moved: int = 0  # usable rows in which the chat template shows an image elsewhere than its text does
    over_limit: int = 0  # usable rows with more tokens than the limit
    tokens: list[int] = field(default_factory=list)  # of each row, image tokens too; 0 for one that cannot be used
    text_tokens: list[int] = field(default_factory=list)  # of each row without image tokens
    samples: list[tuple[str, str]] = field(default_factory=list)  # names of rows, with what the model reads of them

    @property
    def short_name(self) -> str:
        """The last part of its path, with the split."""
        return self.name.rstrip("/").rpartition("/")[2]

    def count(self, reasons: tuple[str, ...]) -> int:
        """How many rows cannot be used for these reasons."""
        return sum(self.reasons[reason] for reason in reasons)


def print_report(
    console: Console, reports: list[SourceReport], failures: list[str], collator: Any, notes: Sequence[str] = ()
) -> None:
    """Print all tables, samples, and whether a run would fail."""
    for report in reports:
        if report.name != report.short_name:  # tables would break it
            console.print(f"{report.short_name}: {report.name}", markup=False, highlight=False)
    room = 72 + max(len(report.short_name) for report in reports)  # names are to be found again, so none is broken
    console.print(_row_table(reports), width=max(console.width, room))
    if any(report.answer_types for report in reports):
        console.print(_type_table(reports))
    if any(report.reasons for report in reports):
        _print_problems(console, reports)
    for report in reports:
        if report.unread:
            console.print(f"columns of {report.name} that are not read: {', '.join(report.unread)}", markup=False)
    limit = getattr(collator, collator.limit)
    limited = f"{collator.limit} is {limit}" if limit is not None else f"no {collator.limit}"
    tokens = [count for report in reports for count in report.tokens if count]
    text_tokens = [count for report in reports for count in report.text_tokens if count]
    if tokens:
        console.print(histogram(f"Tokens a row, image tokens included; {limited}", tokens))
        console.print(histogram("Tokens a row without image tokens", text_tokens))
    for report in reports:
        if report.moved:
            console.print(f"{report.name}: {MOVED} ({report.moved} rows)", markup=False, highlight=False)
        for name, text in report.samples:
            console.rule(f"{name}, as the model reads it")
            console.print(text, markup=False, highlight=False)
    console.rule()
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    for failure in failures:
        console.print(f"a run would fail: {failure}", style="bold red", markup=False, highlight=False)
    if not failures:
        console.print("ok: all rows that a run would use can be used", style="bold green")


def histogram(title: str, values: list[int]) -> Table:
    """A table of how many values are in which range of one width, with quantiles in its caption.

    >>> [list(column.cells) for column in histogram("", [1, 2, 30]).columns][:2]
    [['1-10', '11-20', '21-30'], ['2', '0', '1']]
    """
    width = _round_up(max(values) / BARS)
    counts = Counter((value - 1) // width for value in values)
    ordered = sorted(values)
    quantiles = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}
    last = len(ordered) - 1
    caption = ", ".join(f"{name} {ordered[min(last, int(share * len(ordered)))]}" for name, share in quantiles.items())
    table = Table("tokens", "rows", "", title=title, caption=caption)
    table.columns[1].justify = "right"
    most = max(counts.values())
    for step in range(min(counts), max(counts) + 1):
        bar = "█" * round(40 * counts[step] / most) or ("▏" if counts[step] else "")
        table.add_row(f"{step * width + 1}-{(step + 1) * width}", str(counts[step]), bar)
    return table


def _round_up(width: float) -> int:
    """To 10, 20, 50, 100, 200, ..."""
    size = 10
    while True:
        for factor in (1, 2, 5):
            if width <= size * factor:
                return size * factor
        size *= 10


def _row_table(reports: list[SourceReport]) -> Table:
    columns = ("rows", "usable", "text only", "image missing", "image unreadable", "no captions", "over_the limit")
    table = Table("data set", title="Rows")
    for column in columns:
        table.add_column(column.replace(" ", "\n").replace("_", " "), justify="right", no_wrap=True)
    table.columns[0].no_wrap = True
    for report in reports:
        numbers = (report.rows, report.usable, report.text_only, report.count(MISSING), report.count(UNREADABLE))
        table.add_row(report.short_name, *map(str, (*numbers, report.without_captions, report.over_limit)))
    return table


def _type_table(reports: list[SourceReport]) -> Table:
    types = sorted({kind for report in reports for kind in report.answer_types})
    table = Table("data set", *types, title="Usable rows by answer type")
    for report in reports:
        table.add_row(report.short_name, *(str(report.answer_types[kind]) for kind in types))
    return table


def _print_problems(console: Console, reports: list[SourceReport]) -> None:
    """One line for each reason, whole: paths in it are to be copied."""
    console.print("Rows that cannot be used:", markup=False)
    for report in reports:
        for reason, count in report.reasons.most_common():
            line = f"  {report.short_name}: {count} {reason}; first {report.examples[reason]}"
            console.print(line, markup=False, highlight=False)
