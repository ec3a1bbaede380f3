"""What an evaluation finds out: questions, the answers of each model with what is wrong in them, and measures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from tqdm import tqdm

from trl_llava.tools.evaluate.model import Decoding, EvaluationModel, Generated, Row
from trl_llava.tools.evaluate.statistics import RESAMPLES, Estimate, Statistic, difference, estimate, ratio


class Measure(NamedTuple):
    """A number of a task; `better` says which way is good, None where neither is; `by` who gave it, if a model did."""

    name: str
    text: str
    better: Literal["higher", "lower"] | None = None
    by: str = ""


@dataclass(frozen=True)
class Question:
    """What was asked, and what is true."""

    name: str  # of the row
    text: str
    images: Sequence[Any]  # references for `data.images.load_image`
    truth: str = ""


@dataclass(frozen=True)
class Outcome:
    """A model's answer to a question, and what is to be said of it."""

    text: str
    wrong: bool = False
    note: str = ""
    marks: list[tuple[int, int]] = field(default_factory=list)  # places in the text that are wrong
    counts: dict[str, tuple[float, float]] = field(default_factory=dict)  # measure -> its share in ratio's two sums
    details: dict[str, Any] = field(default_factory=dict)  # further columns of the file of answers


@dataclass
class TaskResult:
    """A task's questions with the outcomes of every model, in the order of the models."""

    task: str
    models: list[str]
    questions: list[Question]
    outcomes: list[list[Outcome]]
    measures: list[Measure]
    note: str = ""
    statistics: list[dict[str, Statistic]] = field(default_factory=list)  # of each model; by default from the counts
    units: int = 0  # what is resampled; by default the questions
    resamples: int = RESAMPLES

    def __post_init__(self) -> None:
        self.units = self.units or len(self.questions)
        self.statistics = self.statistics or [self._from_counts(outcomes) for outcomes in self.outcomes]
        self.measures = [measure for measure in self.measures if measure.name in self.statistics[0]]

    def _from_counts(self, outcomes: list[Outcome]) -> dict[str, Statistic]:
        names = {name for outcome in outcomes for name in outcome.counts}
        pairs = {name: [outcome.counts.get(name, (0.0, 0.0)) for outcome in outcomes] for name in names}
        return {name: ratio(*zip(*own, strict=True)) for name, own in pairs.items()}

    def estimates(self, measure: Measure) -> list[Estimate]:
        """The measure of each model."""
        return [estimate(own[measure.name], self.units, resamples=self.resamples) for own in self.statistics]

    def differences(self, measure: Measure) -> list[Estimate]:
        """How far each model but the first is from the first one."""
        first, *others = [own[measure.name] for own in self.statistics]
        return [difference(first, other, self.units, resamples=self.resamples) for other in others]


class Task(Protocol):
    """Questions that a model is asked, and how its answers are judged once every model has been asked."""

    name: str

    def ask(self, model: EvaluationModel, decoding: Decoding) -> list[Any]:
        """A model's answers."""

    def judge(self, models: list[str], answers: list[list[Any]]) -> TaskResult:
        """What the answers of all models are worth."""


def ask_rows(model: EvaluationModel, task: str, rows: Sequence[Row], decoding: Decoding) -> list[Generated]:
    """A model's completions of rows, with a bar on a terminal."""
    completions = model.complete(rows, decoding)
    return list(tqdm(completions, desc=f"{model.name}: {task}", total=len(rows), disable=None))
