"""How true answers are: invented objects (CHAIR), recall, accuracy of yes, no and choices, length."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trl_llava.demo.language import LETTERS, mentioned

_FIRST_WORD = re.compile(r"\W*(\w+)")


@dataclass(frozen=True)
class Answered:
    """One answer with the truth about its picture.

    Attributes:
        kind: "describe", "yes_no" or "choice".
        answer_type: The right answer: "general", "yes", "no" or a letter.
        objects: The names of the objects in the picture.
        text: What was answered.
        tokens: Its length in tokens, end-of-turn included.
    """

    kind: str
    answer_type: str
    objects: tuple[str, ...]
    text: str
    tokens: int


@dataclass(frozen=True)
class Truthfulness:
    """Means over many answers; `None` where no question of that kind was asked.

    Attributes:
        chair: Share of mentioned objects that are not there (CHAIR-i, arXiv 1809.02156), over all descriptions.
        invented: Share of descriptions that mention at least one object that is not there (CHAIR-s).
        recall: Share of the objects in the pictures that the descriptions mention.
        yes_accuracy: Share of right answers where "yes" is right.
        no_accuracy: Share of right answers where "no" is right.
        choice_accuracy: Share of right answers to multiple-choice questions.
        length: Mean length of a description in tokens.
    """

    chair: float | None
    invented: float | None
    recall: float | None
    yes_accuracy: float | None
    no_accuracy: float | None
    choice_accuracy: float | None
    length: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The means under their names, for a JSON file."""
        return asdict(self)


def invented_objects(text: str, objects: Sequence[str]) -> list[str]:
    """The objects in a text that are not in the picture.

    Args:
        text: An answer.
        objects: Names of the objects that are there.

    Returns:
        Names in the order in which they appear, repeated if they are.
    """
    return [name for name in mentioned(text) if name not in objects]


def is_right(answered: Answered) -> bool:
    """Whether a yes/no or multiple-choice question is answered rightly.

    Args:
        answered: The answer; only its first word counts, as in the correctness term.

    Returns:
        `True` if the first word is the right one: "Yes", "No", or the letter of the option.
    """
    match = _FIRST_WORD.match(answered.text)
    return match is not None and match.group(1).lower() == answered.answer_type.lower()


def measure(answers: Sequence[Answered]) -> Truthfulness:
    """Take the means over a set of answers.

    Args:
        answers: Answers to questions of any kinds.

    Returns:
        The means. An object mentioned twice counts twice in `chair` and once in `recall`.
    """
    described = [a for a in answers if a.kind == "describe"]
    mentions = [len(mentioned(a.text)) for a in described]
    false = [len(invented_objects(a.text, a.objects)) for a in described]
    found = [len(set(mentioned(a.text)) & set(a.objects)) for a in described]

    def accuracy(*types: str) -> float | None:
        return _share([is_right(a) for a in answers if a.answer_type in types])

    return Truthfulness(
        chair=sum(false) / max(sum(mentions), 1) if described else None,
        invented=_share([count > 0 for count in false]),
        recall=sum(found) / sum(len(a.objects) for a in described) if described else None,
        yes_accuracy=accuracy("yes"),
        no_accuracy=accuracy("no"),
        choice_accuracy=accuracy(*LETTERS),
        length=sum(a.tokens for a in described) / len(described) if described else None,
    )


def asked(mean: float | None) -> float:
    """A mean over questions that the demo does ask.

    Args:
        mean: A field of `Truthfulness`.

    Returns:
        The mean.

    Raises:
        ValueError: If no such question was asked.
    """
    if mean is None:
        raise ValueError("no question of this kind was asked")
    return mean


def _share(outcomes: list[bool]) -> float | None:
    return sum(outcomes) / len(outcomes) if outcomes else None
