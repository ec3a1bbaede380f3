"""report.html: one page that needs nothing else, with images, answers before and after, charts and recipes."""

import base64
import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from trl_llava.demo.data import IMAGES
from trl_llava.demo.language import mentioned
from trl_llava.demo.metrics import Answered, invented_objects, is_right, known
from trl_llava.demo.stages import WEAK_EYES, Stages
from trl_llava.demo.summary import VARIANTS, standard_error

POLICIES = {"sft": "after SFT", "ppo_plain": "after PPO, plain", "ppo": "after PPO, captions"}
SHOWN = {"describe": 12, "yes_no": 4, "choice": 4}


def write_report(stages: Stages, summary: dict[str, Any], charts: dict[str, Path], path: Path) -> None:
    """Write the page; `charts` are PNG files by caption."""
    environment = Environment(
        loader=PackageLoader("trl_llava.demo", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        records=stages.records,
        policies=[(label, _row(stages, result)) for result, label in POLICIES.items()],
        variants=VARIANTS,
        examples=_examples(stages),
        charts={title: _inline(file.read_bytes()) for title, file in charts.items()},
    )
    path.write_text(page, encoding="utf-8")


def marked(text: str, objects: tuple[str, ...]) -> list[tuple[str, bool]]:
    """Cut an answer at the objects it invents: pieces that join to the text, each with `True` if it is invented."""
    names = set(invented_objects(text, objects))
    if not names:
        return [(text, False)]
    pieces = re.split("(" + "|".join(sorted(names)) + ")", text)
    return [(piece, piece in names) for piece in pieces if piece]


def _row(stages: Stages, result: str) -> dict[str, Any]:
    """The numbers of one policy, with the standard errors of the two shares that matter."""
    found = stages.evaluations[result]
    described = [a for a in found.answers if a.kind == "describe"]
    record = stages.records[result]
    return found.quality.as_dict() | {
        "chair_error": standard_error(known(found.quality.chair), sum(len(mentioned(a.text)) for a in described)),
        "recall_error": standard_error(known(found.quality.recall), sum(len(a.objects) for a in described)),
        "kl": record.last("objective/kl") if result.startswith("ppo") else None,
    }


def _examples(stages: Stages) -> list[dict[str, Any]]:
    """The first unseen images of each kind of question: taken in order, not chosen."""
    left = dict(SHOWN)
    examples = []
    for index, row in enumerate(stages.unseen):
        if not left[row["kind"]]:
            continue
        left[row["kind"]] -= 1
        image = Image.open(stages.folder / "data" / IMAGES / row["images"][0])
        answers = [stages.evaluations[result].answers[index] for result in POLICIES]
        examples.append(
            {
                "kind": row["kind"],
                "image": _inline(_png(image)),
                "blurred": _inline(_png(image.resize((WEAK_EYES, WEAK_EYES), Image.Resampling.BICUBIC))),
                "question": row["prompt"][-1]["content"],
                "objects": row["objects"],
                "answers": [_judged(answer) for answer in answers],
            }
        )
    order = list(SHOWN)
    return sorted(examples, key=lambda example: order.index(example["kind"]))


def _judged(answer: Answered) -> dict[str, Any]:
    if answer.kind == "describe":
        missing = [name for name in answer.objects if name not in mentioned(answer.text)]
        return {"pieces": marked(answer.text, answer.objects), "missing": missing, "wrong": False}
    return {"pieces": [(answer.text, False)], "missing": [], "wrong": not is_right(answer)}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
