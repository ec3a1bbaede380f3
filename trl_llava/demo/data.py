"""Write the demo's rows: images as PNG files, one JSON line per row, as any user of the loaders would."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_llava.demo import language
from trl_llava.demo.world import Scene, draw, make_scene

IMAGES = "pictures"
KINDS = {"describe": 0.6, "yes_no": 0.2, "choice": 0.2}
# Of the closed questions in stage 1; a policy that is never wrong has nothing to explore.
FALSE_ANSWERS = 0.12


@dataclass(frozen=True)
class Sizes:
    """How many rows are written."""

    images: int = 2500  # that the rows for training share
    sft: int = 3200
    preference: int = 4800
    preference_test: int = 500  # pairs about images that no training row shows
    prompts: int = 2560
    unseen: int = 300  # images that no training row shows, each with one question of each kind


def write_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write `pictures/`, and each data set as `train.jsonl` in its own folder, two of them also as `test.jsonl`."""
    (folder / IMAGES).mkdir(parents=True)
    rng = random.Random(f"demo {seed}")
    seen = _images(folder, "seen", sizes.images, rng)
    unseen = _images(folder, "unseen", max(sizes.unseen, sizes.preference_test), rng)

    def about(images: list[tuple[str, Scene]], count: int, row: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
        chosen = (rng.choice(images) for _ in range(count))
        kinds = rng.choices(list(KINDS), list(KINDS.values()), k=count)
        return [
            row(name, scene, language.ask(kind, scene, rng), rng)
            for (name, scene), kind in zip(chosen, kinds, strict=True)
        ]

    _write(folder / "sft" / "train.jsonl", about(seen, sizes.sft, sft_row))
    _write(folder / "preference" / "train.jsonl", about(seen, sizes.preference, preference_row))
    _write(folder / "preference" / "test.jsonl", about(unseen, sizes.preference_test, preference_row))
    _write(folder / "prompts" / "train.jsonl", about(seen, sizes.prompts, prompt_row))
    unseen_kinds = [(name, scene, kind) for name, scene in unseen[: sizes.unseen] for kind in KINDS]
    rows = [prompt_row(name, scene, language.ask(kind, scene, rng), rng) for name, scene, kind in unseen_kinds]
    _write(folder / "prompts" / "test.jsonl", rows)


def sft_row(image: str, scene: Scene, question: language.Question, rng: random.Random) -> dict[str, Any]:
    """A row of stage 1; descriptions mention objects that are not there, so that the policy learns to hallucinate.

    Some yes/no and multiple-choice questions have false completions, too.
    """
    if question.kind == "describe":
        kept = [name for name in scene.names if rng.random() < 0.97]
        invented = language.absent(scene, rng, rng.choices((0, 1, 2, 3), (0.22, 0.36, 0.28, 0.14))[0])
        names = kept + invented or list(scene.names)
        text = language.description(rng.sample(names, len(names)))
    else:
        answer = language.false_answer if rng.random() < FALSE_ANSWERS else language.answer
        text = answer(question, scene, rng)
    return {**_prompt(image, question), "completion": _message("assistant", text)}


def preference_row(image: str, scene: Scene, question: language.Question, rng: random.Random) -> dict[str, Any]:
    """A pair of stage 2: a true and complete answer wins against one that invents or leaves something out."""
    chosen = language.answer(question, scene, rng)
    if question.kind == "describe" and rng.random() < 0.4:
        rejected = language.incomplete_answer(scene, rng)
    else:
        rejected = language.false_answer(question, scene, rng)
    pair = {"chosen": _message("assistant", chosen), "rejected": _message("assistant", rejected)}
    return {**_prompt(image, question), **pair, "captions": language.captions(scene, rng)}


def prompt_row(image: str, scene: Scene, question: language.Question, rng: random.Random) -> dict[str, Any]:
    """A row of stage 3, or with its `kind` and `objects` a question of the evaluation."""
    truth = {"answer_type": question.answer_type, "kind": question.kind, "objects": list(scene.names)}
    return {**_prompt(image, question), "captions": language.captions(scene, rng), **truth}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_data` has written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _images(folder: Path, prefix: str, count: int, rng: random.Random) -> list[tuple[str, Scene]]:
    images = []
    for index in range(count):
        scene = make_scene(rng)
        name = f"{prefix}_{index:04}.png"
        draw(scene).save(folder / IMAGES / name)
        images.append((name, scene))
    return images


def _prompt(image: str, question: language.Question) -> dict[str, Any]:
    return {"images": [image], "prompt": _message("user", question.text)}


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
