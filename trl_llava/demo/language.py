"""What is said about a scene: captions, questions of the paper's kinds, truthful and hallucinating answers."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from trl_llava.demo.world import OBJECTS, Scene

DESCRIBE = "Describe the picture."
LETTERS = "ABCD"
_OBJECT = re.compile("|".join(OBJECTS))


@dataclass(frozen=True)
class Question:
    """A question about one scene."""

    kind: str  # "describe", "yes_no" or "choice"
    text: str
    answer_type: str  # "general", "yes", "no", or the letter of the right option, as the correctness term knows them
    options: tuple[str, ...] = ()  # the objects it names: none, one or four


def listing(names: Sequence[str]) -> str:
    """Join object names: "a red circle, a blue square and a white cross"."""
    things = [f"a {name}" for name in names]
    return f"{', '.join(things[:-1])} and {things[-1]}" if len(things) > 1 else things[0]


def description(names: Sequence[str]) -> str:
    """A completion of "Describe the picture." that mentions these objects in this order."""
    return f"I see {listing(names)}."


def mentioned(text: str) -> list[str]:
    """The object names in a text, in the order in which they appear; repeated if they are."""
    return _OBJECT.findall(text)


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Ground truth about a scene: each caption is partial, together they are complete.

    There are two, or three for a scene of four or five objects.
    """
    names = rng.sample(scene.names, len(scene.names))
    count = 2 if len(names) < 4 else 3
    cuts = [0, *sorted(rng.sample(range(1, len(names)), count - 1)), len(names)]
    return [listing(names[start:end]) for start, end in pairwise(cuts)]


def absent(scene: Scene, rng: random.Random, count: int) -> list[str]:
    """Objects that the scene does not show; every other one has a colour and a shape that the scene shows."""
    present = set(scene.names)
    colours, shapes = ({name.split()[i] for name in present} for i in (0, 1))
    rest = [name for name in OBJECTS if name not in present]
    close = [name for name in rest if name.split()[0] in colours and name.split()[1] in shapes]
    chosen: list[str] = []
    while len(chosen) < count:
        pool = close if close and rng.random() < 0.5 else rest
        name = rng.choice(pool)
        if name not in chosen:
            chosen.append(name)
        elif pool is close:
            close = [other for other in close if other not in chosen]
    return chosen


def ask(kind: str, scene: Scene, rng: random.Random) -> Question:
    """Make up a question of the kind "describe", "yes_no" or "choice"; all right answers are equally likely."""
    if kind == "describe":
        return Question(kind, DESCRIBE, "general")
    if kind == "yes_no":
        yes = rng.random() < 0.5
        name = rng.choice(scene.names) if yes else absent(scene, rng, 1)[0]
        return Question(kind, f"Is there a {name}?", "yes" if yes else "no", (name,))
    if kind == "choice":
        right = rng.randrange(4)
        options = absent(scene, rng, 3)
        options.insert(right, rng.choice(scene.names))
        listed = " ".join(f"{letter}. a {name}" for letter, name in zip(LETTERS, options, strict=True))
        return Question(kind, f"Which is there? {listed}", LETTERS[right], tuple(options))
    raise ValueError(f"unknown kind of question {kind!r}; expected describe, yes_no or choice.")


def answer(question: Question, scene: Scene, rng: random.Random) -> str:
    """A true and complete answer; the order in which a description mentions the objects is drawn."""
    if question.kind == "describe":
        return description(rng.sample(scene.names, len(scene.names)))
    if question.kind == "yes_no":
        return _yes_or_no(question, question.answer_type == "yes")
    return option_text(question, question.answer_type)


def false_answer(question: Question, scene: Scene, rng: random.Random) -> str:
    """An answer that invents: one or two absent objects in a description, or the wrong option.

    A false description is otherwise as complete as a true one, or swaps present objects for the invented.
    """
    if question.kind == "yes_no":
        return _yes_or_no(question, question.answer_type != "yes")
    if question.kind == "choice":
        return option_text(question, rng.choice(LETTERS.replace(question.answer_type, "")))
    invented = absent(scene, rng, rng.randint(1, 2))
    kept = rng.sample(scene.names, len(scene.names) - (len(invented) if rng.random() < 0.5 else 0))
    return description(rng.sample(kept + invented, len(kept) + len(invented)))


def incomplete_answer(scene: Scene, rng: random.Random) -> str:
    """A description that is true and leaves at least one object out."""
    return description(rng.sample(scene.names, rng.randrange(1, len(scene.names))))


def option_text(question: Question, letter: str) -> str:
    """A multiple-choice answer, as the correctness term expects it: "B. a blue square"."""
    return f"{letter}. a {question.options[LETTERS.index(letter)]}"


def _yes_or_no(question: Question, yes: bool) -> str:
    # "Yes." alone was beyond the reward models: whether it is true depends on a word of another turn.
    return f"Yes, I see a {question.options[0]}." if yes else "No, I see none."
