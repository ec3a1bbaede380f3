"""Questions of the user's own: rows with an image, and what is known of it; how right an answer is.

A row with a right answer (`answer`, or an `answer_type` of yes, no or a letter) counts for accuracy; one with a list
of the `objects` in its image, and no right answer, for invented objects. Any row with captions can be scored by a
factual reward model.
"""

import re
import string
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trl_llava.data.contract import RowError, abridged
from trl_llava.errors import InputError
from trl_llava.prompts import message_text
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.tools.evaluate.model import Decoding, EvaluationModel, Generated, Row
from trl_llava.tools.evaluate.objects import Vocabulary
from trl_llava.tools.evaluate.results import Measure, Outcome, Question, TaskResult, ask_rows
from trl_llava.tools.evaluate.scorers import Scorer

MEASURES = [
    Measure("invented_objects", "mentioned objects that are not in the image (CHAIR-i)", "lower"),
    Measure("inventing_completions", "completions with an object that is not in the image (CHAIR-s)", "lower"),
    Measure("object_recall", "objects in the images that are mentioned", "higher"),
    Measure("yes_no_accuracy", "right among yes/no questions", "higher"),
    Measure("accuracy_yes", "right where yes is right", "higher"),
    Measure("accuracy_no", "right where no is right", "higher"),
    Measure("says_yes", "yes/no questions answered with yes"),
    Measure("choice_accuracy", "right among multiple-choice questions", "higher"),
    Measure("exact_match", "completions that are the right answer, articles and punctuation aside", "higher"),
    Measure("reward", "mean score", "higher"),
    Measure("tokens", "mean length in tokens"),
    Measure("empty", "empty completions", "lower"),
    Measure("unfinished", "completions cut at --max_new_tokens", "lower"),
]
_WORD = re.compile(r"\W*(\w+)")
_LETTER = re.compile(r"^\s*\(?([A-Z])(?:[.):,]|\s*$)|\b(?:option|answer) is:? \(?([A-Z])\b")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class OwnTask:
    """The rows of one data set as a task.

    Args:
        name: What tables call it.
        rows: Rows of the prompt stage.
        vocabulary_rows: All rows of the data set, whose object lists make the vocabulary.
        vocabulary_file: Further names of objects.
        reward: The name of a factual reward model, and what loads it once the policies are gone.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        vocabulary_rows: Sequence[Row],
        vocabulary_file: str | None = None,
        reward: tuple[str, Callable[[], FactualReward]] | None = None,
    ) -> None:
        self.name = name
        self.reward = reward
        self.rows = rows
        lists = [_objects(row) or [] for row in vocabulary_rows]
        has_lists = any(lists)
        self.vocabulary = Vocabulary.of(lists, vocabulary_file) if has_lists else None
        if vocabulary_file is not None and not has_lists:
            raise InputError(f"--vocabulary: no row of {name} has a list `objects` to compare with")
        self.questions = [
            Question(row["row_name"], message_text(row["prompt"][-1]), partial(self._images, number), _truth(row))
            for number, row in enumerate(rows)
        ]

    def ask(self, model: EvaluationModel, decoding: Decoding) -> list[Generated]:
        """A model's completions of the rows."""
        return ask_rows(model, self.name, self.rows, decoding)

    def judge(self, models: list[str], answers: list[list[Generated]]) -> TaskResult:
        """Compare the models' answers with what is known of the images."""
        scores: list[list[float | None]] = [[None] * len(self.rows) for _ in models]
        by = ""
        if self.reward is not None:
            by, load = self.reward
            scorer = Scorer(by, load())
            scores = [
                [*scorer.scores_of(self.rows, partial(_said, own), model)]
                for model, own in zip(models, answers, strict=True)
            ]
        outcomes = [
            [self._outcome(*found) for found in zip(self.rows, own, marks, strict=True)]
            for own, marks in zip(answers, scores, strict=True)
        ]
        notes = [f"{len(self.rows)} questions"]
        if self.vocabulary is not None:
            notes.append(f"{len(set(self.vocabulary.names.values()))} objects can be found in a text, no others")
        measures = [measure._replace(by=by) if measure.name == "reward" else measure for measure in MEASURES]
        return TaskResult(self.name, models, self.questions, outcomes, measures, "; ".join(notes))

    def _images(self, number: int) -> list[Any]:
        images: list[Any] = self.rows[number]["images"]
        return images

    def _outcome(self, row: Row, answer: Generated, score: float | None) -> Outcome:
        counts: dict[str, tuple[float, float]] = {
            "tokens": (answer.tokens, 1),
            "empty": (not answer.text, 1),
            "unfinished": (not answer.finished, 1),
        }
        details: dict[str, Any] = {"tokens": answer.tokens, "finished": answer.finished}
        if score is not None:
            counts["reward"], details["score"] = (score, 1), score
        right, objects = _right_answers(row), _objects(row)
        if right:
            return _closed(answer.text, right, counts, details)
        if objects is not None and self.vocabulary is not None:
            return _open(answer.text, objects, self.vocabulary, counts, details)
        return Outcome(answer.text, counts=counts, details=details)


def _said(answers: list[Generated], place: int, row: Row) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": answers[place].text}]


def _open(text: str, objects: list[str], vocabulary: Vocabulary, counts: Any, details: Any) -> Outcome:
    mentions, invented = vocabulary.mentions(text), vocabulary.invented(text, objects)
    there = {vocabulary.names[name.lower()] for name in objects}
    found = there & {mention.name for mention in mentions}
    counts["invented_objects"] = (len(invented), len(mentions))
    counts["inventing_completions"] = (bool(invented), 1)
    counts["object_recall"] = (len(found), len(there))
    missing = sorted(there - found)
    note = f"left out: {', '.join(missing)}" if missing else ""
    details |= {"invented": [mention.name for mention in invented], "left_out": missing}
    return Outcome(text, bool(invented), note, [(mention.start, mention.end) for mention in invented], counts, details)


def _closed(text: str, right: list[str], counts: Any, details: Any) -> Outcome:
    kind = kind_of(right)
    given = read_answer(text, kind)
    correct = given in {read_right(answer, kind) for answer in right}
    details |= {"right": correct}
    if kind == "yes_no":
        counts["yes_no_accuracy"] = counts[f"accuracy_{right[0].lower()}"] = (correct, 1)
        counts["says_yes"] = (given == "yes", 1)
    else:
        counts[{"choice": "choice_accuracy", "exact": "exact_match"}[kind]] = (correct, 1)
    unread = f" (no {'yes or no' if kind == 'yes_no' else 'letter'} found)" if given is None else ""
    return Outcome(text, not correct, "" if correct else f"wrong{unread}", [], counts, details)


def kind_of(right: list[str]) -> str:
    """How answers like the right one are read: `yes_no`, `choice` (a capital letter) or `exact`.

    >>> kind_of(["No"]), kind_of(["B"]), kind_of(["two", "2"])
    ('yes_no', 'choice', 'exact')
    """
    if len(right) == 1 and right[0].lower() in ("yes", "no"):
        return "yes_no"
    return "choice" if len(right) == 1 and re.fullmatch("[A-Z]", right[0]) else "exact"


def read_answer(text: str, kind: str) -> str | None:
    """What a completion answers: its first word if that is yes or no, its letter, or all of it; None if neither.

    >>> read_answer("No, there is none.", "yes_no"), read_answer("Nothing.", "yes_no")
    ('no', None)
    >>> read_answer("B. a cat", "choice"), read_answer("A cat", "choice"), read_answer("The answer is C", "choice")
    ('B', None, 'C')
    >>> read_answer("The two cats.", "exact")
    'two cats'
    """
    if kind == "yes_no":
        word = _WORD.match(text)
        return word.group(1).lower() if word and word.group(1).lower() in ("yes", "no") else None
    if kind == "choice":
        letter = _LETTER.search(text)
        return (letter.group(1) or letter.group(2)) if letter else None
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", plain).split())


def read_right(answer: str, kind: str) -> str | None:
    """A right answer as `read_answer` reads a completion."""
    return answer if kind == "choice" else read_answer(answer, kind)


def _right_answers(row: Row) -> list[str]:
    """The right answer, or several that are; none for an open question."""
    given = row.get("answer")
    if given is None or given == []:
        kind = row["answer_type"]
        return [] if kind == "general" else [kind]
    if isinstance(given, bool):
        return ["yes" if given else "no"]
    answers = [str(answer) for answer in (given if isinstance(given, list) else [given])]
    if not all(answer.strip() for answer in answers):
        raise RowError(row["row_name"], "its answer is empty", "Give the right answer, or leave `answer` out")
    return answers


def _objects(row: Row) -> list[str] | None:
    """The objects in the image, None if they are not known."""
    objects = row.get("objects")
    if objects is None:
        return None
    if not isinstance(objects, list) or not all(isinstance(name, str) and name.strip() for name in objects):
        problem = f"objects is {abridged(objects)}, expected a list of names"
        raise RowError(row["row_name"], problem, 'Write it as ["dog", "red ball"]')
    return objects


def _truth(row: Row) -> str:
    parts = [f"right: {' or '.join(_right_answers(row))}"] if _right_answers(row) else []
    if _objects(row) is not None:
        parts.append(f"in the image: {', '.join(_objects(row) or ['nothing'])}")
    return "; ".join(parts or row["captions"])


def is_own_data(task: str) -> bool:
    """Whether a task is named by a file or folder rather than as a benchmark."""
    return Path(task).suffix in (".json", ".jsonl", ".parquet") or "/" in task or Path(task).exists()
