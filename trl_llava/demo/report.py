"""report.html: the page of `trl-llava report` for the demo's runs, opened by an example and by what it all came to."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import PackageLoader
from PIL import Image

from trl_llava.demo.data import IMAGES
from trl_llava.demo.language import mentioned
from trl_llava.demo.metrics import Answered, invented_objects, is_right, known
from trl_llava.demo.stages import WEAK_EYES, Stages
from trl_llava.demo.summary import BONUSES, standard_error
from trl_llava.tools.report.charts import SERIES, Series, bars, lines
from trl_llava.tools.report.page import Judged, example_of, picture, write_page
from trl_llava.tools.report.runs import Run, read_run
from trl_llava.tools.report.samples import Sample

POLICIES = {"sft": "after SFT", "ppo_plain": "after PPO, plain", "ppo": "after PPO, captions"}
RUNS = ("ppo_plain", "ppo", *BONUSES.values(), "reward_plain", "reward", "sft")
SHOWN = {"describe": 12, "yes_no": 4, "choice": 4}
PANELS = {
    "chair": "Invented among mentioned objects",
    "recall": "Present objects that are mentioned",
    "length": "Tokens per description",
}


def write_report(stages: Stages, summary: dict[str, Any], path: Path) -> None:
    """Write the page."""
    shown = first_of_each_kind(stages)
    opening = example_of_change(stages)
    truths = {_asked(stages, index): stages.unseen[index] for index in {*shown, opening}}

    def judge(sample: Sample) -> Judged:
        row = truths[sample.asked]
        answered = Answered(row["kind"], row["answer_type"], tuple(row["objects"]), sample.completion, 0)
        return judged(answered)

    runs = [_with_answers(stages, read_run(stages.folder / name, name), name, shown) for name in RUNS]
    ppo = next(run for run in runs if run.name == "ppo")
    write_page(
        path,
        runs,
        examples=len(shown),
        judge=judge,
        template="demo.html.j2",
        loader=PackageLoader("trl_llava.demo", "."),
        summary=summary,
        opening=_labelled(example_of(_asked(stages, opening), [_with_answers(stages, ppo, "ppo", [opening])], judge)),
        blurred=picture(_blurred(stages, opening)),
        policies={label: _row(stages, result) for result, label in POLICIES.items()},
        outcome=[_bars(stages, name) for name in ("chair", "recall")] + [_accuracy(summary)],
        unseen=[_curves(summary, name) for name in PANELS],
        commands={name: record.command for name, record in stages.records.items()},
    )


def judged(answer: Answered) -> Judged:
    """An answer with the objects that it invents marked, or all of it where it is wrong, and what it leaves out."""
    if answer.kind != "describe":
        return [(answer.text, not is_right(answer))], ""
    missing = [name for name in answer.objects if name not in mentioned(answer.text)]
    return marked(answer.text, answer.objects), f"left out: {', '.join(missing)}" if missing else ""


def marked(text: str, objects: tuple[str, ...]) -> list[tuple[str, bool]]:
    """Cut an answer at the objects it invents: pieces that join to the text, each with `True` if it is invented."""
    names = set(invented_objects(text, objects))
    if not names:
        return [(text, False)]
    pieces = re.split("(" + "|".join(sorted(names)) + ")", text)
    return [(piece, piece in names) for piece in pieces if piece]


def first_of_each_kind(stages: Stages) -> list[int]:
    """The first unseen rows of each kind of question: taken in order, not chosen."""
    kinds = [row["kind"] for row in stages.unseen]
    return [
        index
        for kind, count in SHOWN.items()
        for index in [index for index, found in enumerate(kinds) if found == kind][:count]
    ]


def example_of_change(stages: Stages) -> int:
    """The first unseen row whose description invents something after SFT and nothing after PPO; else the first row."""
    pairs = zip(*(stages.evaluations[result].answers for result in ("sft", "ppo")), strict=True)
    changed = ([bool(invented_objects(a.text, a.objects)) for a in pair] == [True, False] for pair in pairs)
    kinds = (row["kind"] == "describe" for row in stages.unseen)
    return next((i for i, (so, described) in enumerate(zip(changed, kinds, strict=True)) if so and described), 0)


def _asked(stages: Stages, index: int) -> tuple[Any, ...]:
    return _sample(stages, index, "sft", 0).asked


def _sample(stages: Stages, index: int, result: str, step: int) -> Sample:
    row, answer = stages.unseen[index], stages.evaluations[result].answers[index]
    image = (stages.folder / "data" / IMAGES / row["images"][0]).read_bytes()
    return Sample(step, row["prompt"][-1]["content"], answer.text, tuple(row["captions"]), (image,), (), {})


def _with_answers(stages: Stages, run: Run, result: str, indices: list[int]) -> Run:
    """A PPO run with what the demo itself asked of it, and of its start; others as they are."""
    if run.stage != "ppo":
        return run
    steps = {0: "sft", stages.records[result].steps: result}
    samples = [_sample(stages, index, of, step) for step, of in steps.items() for index in indices]
    return replace(run, samples=samples, missing=[])


def _labelled(example: dict[str, Any]) -> dict[str, Any]:
    for answer, label in zip(example["answers"], (POLICIES["sft"], POLICIES["ppo"]), strict=True):
        answer["label"] = label
    return example


def _blurred(stages: Stages, index: int) -> bytes:
    """An image as the reward models see it."""
    buffer = io.BytesIO()
    image = Image.open(stages.folder / "data" / IMAGES / stages.unseen[index]["images"][0])
    image.resize((WEAK_EYES, WEAK_EYES), Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def standard_errors(stages: Stages, result: str) -> dict[str, float]:
    """The standard errors of the two shares that matter."""
    found = stages.evaluations[result]
    described = [a for a in found.answers if a.kind == "describe"]
    counts = {
        "chair": sum(len(mentioned(a.text)) for a in described),
        "recall": sum(len(a.objects) for a in described),
    }
    quality = found.quality.as_dict()
    return {name: standard_error(known(quality[name]), count) for name, count in counts.items()}


def _row(stages: Stages, result: str) -> list[str]:
    """The numbers of one policy."""
    quality, spread = stages.evaluations[result].quality.as_dict(), standard_errors(stages, result)
    shares = {name: f"{value:.3f}" for name, value in quality.items()}
    shares |= {name: f"{shares[name]} ± {error:.3f}" for name, error in spread.items()}
    shares["length"] = f"{quality['length']:.1f}"
    kl = f"{stages.records[result].last('objective/kl'):.2f}" if result.startswith("ppo") else "-"
    return [*shares.values(), kl]


def _bars(stages: Stages, name: str) -> Any:
    values = {result: known(stages.evaluations[result].quality.as_dict()[name]) for result in POLICIES}
    labels = zip(("SFT", "PPO,\nplain", "PPO,\ncaptions"), (SERIES - 1, 0, 1), strict=True)
    return bars(
        PANELS[name],
        [
            (label, value, standard_errors(stages, result)[name], place)
            for (result, value), (label, place) in zip(values.items(), labels, strict=True)
        ],
    )


def _accuracy(summary: dict[str, Any]) -> Any:
    shares, pairs = summary["reward_model_accuracy"], summary["reward_model_pairs"]
    values = [
        (label, shares[name], standard_error(shares[name], pairs), place)
        for place, (name, label) in enumerate(_VARIANTS.items())
    ]
    return bars("Reward model: right preferences", values, guessing=0.5)


_VARIANTS = {"plain": "plain", "with_captions": "captions"}


def _curves(summary: dict[str, Any], name: str) -> Any:
    series = [
        Series(f"PPO, {label}", [(p["step"], p[name]) for p in summary["ppo"][variant]["curve"]], place, marked=True)
        for place, (variant, label) in enumerate(_VARIANTS.items())
    ]
    # From 0, as a collapse must look like one and nothing else may.
    return lines(PANELS[name], series, "PPO step (0: after SFT)", from_zero=True)
