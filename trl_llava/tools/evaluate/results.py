"""What an evaluation finds out: questions, the answers of each model with what is wrong in them, and measures."""

import math
from collections.abc import Callable, Sequence
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


class Sampled(NamedTuple):
    """A statistic, of how many things it is that are drawn, how often they are, and how many of them it counts."""

    statistic: Statistic
    units: int
    resamples: int = RESAMPLES
    counted: int | None = None  # None: all


UNKNOWN = Sampled(lambda places: float("nan"), 1, 1)
"""A measure that a model does not have."""


@dataclass(frozen=True)
class Question:
    """What was asked, and what is true."""

    name: str  # of the row
    text: str
    images: Callable[[], Sequence[Any]] | Sequence[Any]  # references for `data.images.load_image`, or what makes them
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
    statistics: list[dict[str, Sampled]] = field(default_factory=list)  # of each model, beside those from the counts
    without: str = "not measured"  # why a model lacks a measure that others have

    def __post_init__(self) -> None:
        others = self.statistics or [{} for _ in self.models]
        self.statistics = [
            {**self._from_counts(outcomes), **more} for outcomes, more in zip(self.outcomes, others, strict=True)
        ]
        there = {name for own in self.statistics for name in own}
        self.measures = [measure for measure in self.measures if measure.name in there]

    def _from_counts(self, outcomes: list[Outcome]) -> dict[str, Sampled]:
        names = {name for outcome in outcomes for name in outcome.counts}
        pairs = {name: [outcome.counts.get(name, (0.0, 0.0)) for outcome in outcomes] for name in names}
        asked = {name: sum(name in outcome.counts for outcome in outcomes) for name in names}
        return {
            name: Sampled(ratio(*zip(*own, strict=True)), len(own), counted=asked[name]) for name, own in pairs.items()
        }

    def counted(self, measure: Measure) -> int:
        """Of how many questions, pairs or groups a measure is."""
        there = (own[measure.name] for own in self.statistics if measure.name in own)
        return max(own.units if own.counted is None else own.counted for own in there)

    def reasons(self, measure: Measure, estimates: Sequence[Estimate]) -> dict[str, str]:
        """Why a model has no number, by model, for those that have none."""
        lacks = {
            model: "a share of nothing: none of its answers has what is counted"
            if measure.name in own
            else self.without
            for model, own in zip(self.models, self.statistics, strict=True)
        }
        return {
            model: lacks[model] for model, one in zip(self.models, estimates, strict=True) if math.isnan(one.value)
        }

    def estimates(self, measure: Measure) -> list[Estimate]:
        """The measure of each model."""
        found = [own.get(measure.name, UNKNOWN) for own in self.statistics]
        return [estimate(own.statistic, own.units, resamples=own.resamples) for own in found]

    def differences(self, measure: Measure) -> list[Estimate]:
        """How far each model but the first is from the first one."""
        first, *others = [own.get(measure.name, UNKNOWN) for own in self.statistics]
        return [
            difference(first.statistic, other.statistic, first.units, resamples=first.resamples) for other in others
        ]


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
