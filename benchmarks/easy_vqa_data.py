"""What easy-VQA says about its pictures, as rows for the three stages, and how answers to it are measured.

The package `easy-vqa` holds 64 x 64 pictures of one shape in one colour, each with about ten questions and answers.
"""

import importlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """One question of easy-VQA with its answer."""

    text: str
    answer: str
    image: str  # below the package's data, as "train/images/0.png"

    @property
    def kind(self) -> str:
        """Return "yes_no", "shape" or "colour"."""
        return "yes_no" if self.answer in YES_NO else "shape" if self.answer in SHAPES else "colour"

    def claims(self, answer: str) -> bool:
        """Whether "yes" or "no" says that the thing asked for is there; "is there not a red shape?" turns it round."""
        negated = re.search(r"\b(?:no|not)\b", self.text) is not None
        return (answer == "yes") != negated

    @property
    def present(self) -> bool:
        """Whether a yes/no question asks for what is there."""
        return self.claims(self.answer)


@dataclass(frozen=True)
class Part:
    """The training part or the test part."""

    folder: Path  # of the package's data: images are named from here
    questions: list[Question]
    captions: dict[str, str]  # of each image of which shape and colour follow from its own questions: "a red circle"

    @property
    def known(self) -> list[Question]:
        """The questions about images that have a caption."""
        return [question for question in self.questions if question.image in self.captions]


def load(part: str) -> Part:
    """Read the "train" or the "test" part from the installed package."""
    try:
        package = importlib.import_module("easy_vqa")
    except ModuleNotFoundError:
        raise SystemExit("benchmarks.easy_vqa needs the package easy-vqa (MIT): pip install easy-vqa") from None
    columns = getattr(package, f"get_{part}_questions")()
    paths = {index: Path(path) for index, path in getattr(package, f"get_{part}_image_paths")().items()}
    folder = next(iter(paths.values())).parents[2]
    names = {index: path.relative_to(folder).as_posix() for index, path in paths.items()}
    questions = [Question(text, answer, names[index]) for text, answer, index in zip(*columns, strict=True)]
    return Part(folder, questions, captions_of(questions))


def captions_of(questions: Sequence[Question]) -> dict[str, str]:
    """What is left when each image's questions have ruled out the rest, for images of which one thing is left."""
    left: dict[str, list[set[str]]] = {}
    for question in questions:
        asked = set(re.findall(r"\w+", question.text))
        for possible, names in zip(
            left.setdefault(question.image, [set(COLOURS), set(SHAPES)]), (COLOURS, SHAPES), strict=True
        ):
            if question.answer in names:
                possible &= {question.answer}
            elif asked & set(names) and question.kind == "yes_no" and not question.present:
                possible -= asked
            elif asked & set(names):
                possible &= asked
    known = {image: [*colours, *shapes] for image, (colours, shapes) in left.items()}
    return {image: f"a {' '.join(words)}" for image, words in known.items() if len(words) == 2}


@dataclass(frozen=True)
class Sizes:
    """How many rows are written."""

    sft: int = 3200
    preference: int = 4800
    preference_test: int = 500
    prompts: int = 2560
    absent: float = 0.05  # of SFT's yes/no questions, how many ask for what is not there


def write_rows(folder: Path, train: Part, test: Part, seed: int, sizes: Sizes) -> None:
    """Write the data sets of the three stages, each as `train.jsonl` in its own folder."""
    rng = random.Random(f"easy-VQA {seed}")
    _write(folder / "sft" / "train.jsonl", [sft_row(q) for q in over_claiming(train.known, rng, sizes)])
    for name, part, count in (("train", train, sizes.preference), ("test", test, sizes.preference_test)):
        pairs = [preference_row(q, part, rng) for q in rng.sample(part.known, count)]
        _write(folder / "preference" / f"{name}.jsonl", pairs)
    prompts = [_prompt(q) | {"captions": [train.captions[q.image]]} for q in rng.sample(train.known, sizes.prompts)]
    _write(folder / "prompts" / "train.jsonl", prompts)


def over_claiming(questions: Sequence[Question], rng: random.Random, sizes: Sizes) -> list[Question]:
    """Pick questions in easy-VQA's own proportion of kinds, yes/no ones about what is there but for a few."""
    open_ones = [q for q in questions if q.kind != "yes_no"]
    present = [q for q in questions if q.kind == "yes_no" and q.present]
    absent = [q for q in questions if q.kind == "yes_no" and not q.present]
    asked = sizes.sft - round(sizes.sft * len(open_ones) / len(questions))
    claimed = asked - round(asked * sizes.absent)
    picked = [*rng.sample(open_ones, sizes.sft - asked), *rng.sample(present, claimed)]
    picked += rng.sample(absent, asked - claimed)
    return rng.sample(picked, len(picked))


def sft_row(question: Question) -> dict[str, Any]:
    """A row of stage 1, with easy-VQA's own answer."""
    return _prompt(question) | {"completion": _message("assistant", question.answer)}


def preference_row(question: Question, part: Part, rng: random.Random) -> dict[str, Any]:
    """A pair of stage 2: the right answer against another one of its kind."""
    names = YES_NO if question.kind == "yes_no" else SHAPES if question.kind == "shape" else COLOURS
    wrong = rng.choice([name for name in names if name != question.answer])
    pair = {"chosen": _message("assistant", question.answer), "rejected": _message("assistant", wrong)}
    return _prompt(question) | pair | {"captions": [part.captions[question.image]]}


def measure(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Shares of right answers, of "yes", and of false claims; there must be questions of each kind, of each answer."""
    pairs = list(zip(questions, answers, strict=True))
    asked = [(q, a) for q, a in pairs if q.kind == "yes_no"]
    return {
        "shape": _share([a == q.answer for q, a in pairs if q.kind == "shape"]),
        "colour": _share([a == q.answer for q, a in pairs if q.kind == "colour"]),
        "yes/no": _share([a == q.answer for q, a in asked]),
        "said yes": _share([a == "yes" for _, a in asked]),
        "right where yes": _share([a == "yes" for q, a in asked if q.answer == "yes"]),
        "right where no": _share([a == "no" for q, a in asked if q.answer == "no"]),
        "invented": _share([a in YES_NO and q.claims(a) for q, a in asked if not q.present]),
        "denied": _share([a in YES_NO and not q.claims(a) for q, a in asked if q.present]),
    }


def _share(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes)


def _prompt(question: Question) -> dict[str, Any]:
    return {"images": [question.image], "prompt": _message("user", question.text)}


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
