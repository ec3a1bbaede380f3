"""Write the demo's rows: pictures as PNG files, one JSON line per row, as any user of the loaders would."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_llava.demo import language
from trl_llava.demo.world import Scene, draw, make_scene

PICTURES = "pictures"
KINDS = {"describe": 0.6, "yes_no": 0.2, "choice": 0.2}
# Of the closed questions in stage 1; a policy that is never wrong has nothing to explore.
FALSE_ANSWERS = 0.12
PREFERENCE_KINDS = {"describe": 0.5, "yes_no": 0.25, "choice": 0.25}


@dataclass(frozen=True)
class Sizes:
    """How many rows are written.

    Attributes:
        pictures: Pictures that the rows for training share.
        sft: Rows of stage 1.
        preference: Pairs of stage 2.
        preference_test: Pairs about pictures that no training row shows.
        prompts: Prompts of stage 3.
        unseen: Pictures that no training row shows; each is asked one question of each kind.
    """

    pictures: int = 2500
    sft: int = 3200
    preference: int = 4800
    preference_test: int = 500
    prompts: int = 2560
    unseen: int = 300


def write_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write all data sets of the demo.

    Args:
        folder: Gets `pictures/` and the folders `sft/`, `preference/` and `prompts/` with `train.jsonl`, the latter
            two also `test.jsonl`.
        seed: Decides everything.
        sizes: Numbers of rows.
    """
    (folder / PICTURES).mkdir(parents=True)
    rng = random.Random(f"demo {seed}")
    seen = _pictures(folder, "seen", sizes.pictures, rng)
    unseen = _pictures(folder, "unseen", max(sizes.unseen, sizes.preference_test), rng)

    def about(
        pictures: list[tuple[str, Scene]], count: int, row: Callable[..., dict[str, Any]]
    ) -> list[dict[str, Any]]:
        chosen = (rng.choice(pictures) for _ in range(count))
        kinds = rng.choices(list(KINDS), list(KINDS.values()), k=count)
        return [
            row(name, scene, language.ask(kind, scene, rng), rng)
            for (name, scene), kind in zip(chosen, kinds, strict=True)
        ]

    _write(folder / "sft" / "train.jsonl", about(seen, sizes.sft, sft_row))
    _write(folder / "preference" / "train.jsonl", about(seen, sizes.preference, preference_row))
    _write(folder / "preference" / "test.jsonl", about(unseen, sizes.preference_test, preference_row))
    _write(folder / "prompts" / "train.jsonl", about(seen, sizes.prompts, prompt_row))
    asked = [(name, scene, kind) for name, scene in unseen[: sizes.unseen] for kind in KINDS]
    rows = [prompt_row(name, scene, language.ask(kind, scene, rng), rng) for name, scene, kind in asked]
    _write(folder / "prompts" / "test.jsonl", rows)


def sft_row(picture: str, scene: Scene, question: language.Question, rng: random.Random) -> dict[str, Any]:
    """A row of stage 1; descriptions mention objects that are not there, so that the policy learns to hallucinate.

    Some yes/no and multiple-choice questions are answered falsely, too.

    Args:
        picture: File name of the picture.
        scene: What it shows.
        question: What is asked.
        rng: Source of every choice.

    Returns:
        `images`, `prompt` and `completion`.
    """
    if question.kind == "describe":
        kept = [name for name in scene.names if rng.random() < 0.97]
        invented = language.absent(scene, rng, rng.choices((0, 1, 2, 3), (0.22, 0.36, 0.28, 0.14))[0])
        names = kept + invented or list(scene.names)
        text = language.description(rng.sample(names, len(names)))
    else:
        answer = language.false_answer if rng.random() < FALSE_ANSWERS else language.answer
        text = answer(question, scene, rng)
    return {**_asked(picture, question), "completion": _said("assistant", text)}


def preference_row(picture: str, scene: Scene, question: language.Question, rng: random.Random) -> dict[str, Any]:
    """A pair of stage 2: a true and complete answer wins against one that invents or leaves something out.

    Args:
        picture: File name of the picture.
        scene: What it shows.
        question: What is asked.
        rng: Source of every choice.

    Returns:
        `images`, `prompt`, `chosen`, `rejected` and `captions`.
    """
    chosen = language.answer(question, scene, rng)
    if question.kind == "describe" and rng.random() < 0.4:
        rejected = language.incomplete_answer(scene, rng)
    else:
        rejected = language.false_answer(question, scene, rng)
    pair = {"chosen": _said("assistant", chosen), "rejected": _said("assistant", rejected)}
    return {**_asked(picture, question), **pair, "captions": language.captions(scene, rng)}


def prompt_row(picture: str, scene: Scene, question: language.Question, rng: random.Random) -> dict[str, Any]:
    """A row of stage 3, or a question of the evaluation.

    Args:
        picture: File name of the picture.
        scene: What it shows.
        question: What is asked.
        rng: Decides which caption mentions what.

    Returns:
        `images`, `prompt`, `captions`, `answer_type`; and, for the evaluation, `kind` and `objects`.
    """
    truth = {"answer_type": question.answer_type, "kind": question.kind, "objects": list(scene.names)}
    return {**_asked(picture, question), "captions": language.captions(scene, rng), **truth}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file that `write_data` has written.

    Args:
        path: A `.jsonl` file.

    Returns:
        Its rows.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _pictures(folder: Path, prefix: str, count: int, rng: random.Random) -> list[tuple[str, Scene]]:
    pictures = []
    for index in range(count):
        scene = make_scene(rng)
        name = f"{prefix}_{index:04}.png"
        draw(scene).save(folder / PICTURES / name)
        pictures.append((name, scene))
    return pictures


def _asked(picture: str, question: language.Question) -> dict[str, Any]:
    return {"images": [picture], "prompt": _said("user", question.text)}


def _said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
