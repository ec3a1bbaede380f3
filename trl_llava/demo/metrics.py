"""How true answers are: invented objects (CHAIR), recall, accuracy of yes, no and choices, length."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trl_llava.demo.language import LETTERS, mentioned

_FIRST_WORD = re.compile(r"\W*(\w+)")


@dataclass(frozen=True)
class Answered:
    """One answer with the truth about its image."""

    kind: str  # "describe", "yes_no" or "choice"
    answer_type: str  # "general", or the right answer: "yes", "no" or a letter
    objects: tuple[str, ...]  # that are in the image
    text: str
    tokens: int  # end-of-turn included


@dataclass(frozen=True)
class Truthfulness:
    """Means over many answers; `None` where there was no question of that kind."""

    chair: float | None  # share of mentioned objects that are not there (CHAIR-i, arXiv 1809.02156), in descriptions
    invented: float | None  # share of descriptions that mention at least one object that is not there (CHAIR-s)
    recall: float | None  # share of the objects in the images that the descriptions mention
    yes_accuracy: float | None  # share of right answers where "yes" is right
    no_accuracy: float | None
    choice_accuracy: float | None
    length: float | None  # mean length of a description in tokens

    def as_dict(self) -> dict[str, float | None]:
        """The means under their names, for a JSON file."""
        return asdict(self)


def invented_objects(text: str, objects: Sequence[str]) -> list[str]:
    """The objects in a text that are not in the image, in their order, repeated if they are."""
    return [name for name in mentioned(text) if name not in objects]


def is_right(answered: Answered) -> bool:
    """Whether an answer's first word, all that counts in the correctness term, is right: "Yes", "No" or a letter."""
    match = _FIRST_WORD.match(answered.text)
    return match is not None and match.group(1).lower() == answered.answer_type.lower()


def measure(answers: Sequence[Answered]) -> Truthfulness:
    """Take the means; an object mentioned twice counts twice in `chair` and once in `recall`."""
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


def known(mean: float | None) -> float:
    """A mean that the demo always has."""
    if mean is None:
        raise ValueError("there was no question of this kind")
    return mean


def _share(outcomes: list[bool]) -> float | None:
    return sum(outcomes) / len(outcomes) if outcomes else None
