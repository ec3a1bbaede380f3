"""The page: runs of one stage beside each other, curves overlaid, the same prompts side by side."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from trl_llava.data.thumbnails import data_url
from trl_llava.errors import OccupiedError
from trl_llava.publish.card_plots import CURVES, curves_of
from trl_llava.publish.model_card import TITLES
from trl_llava.run.atomic_files import write_atomically
from trl_llava.run.output_dir import NOT_COMPARED
from trl_llava.tools.report.charts import Chart, Series, lines, number, scatter
from trl_llava.tools.report.evaluations import evaluation_table
from trl_llava.tools.report.runs import Run
from trl_llava.tools.report.samples import Sample

GENERATOR = "trl-llava report"
"""In the head of every page, by which a later one knows that it may take its place."""

Judged = tuple[Sequence[tuple[str, bool]], str]
"""A completion in pieces, each with whether it is marked as wrong, and a remark."""
Judge = Callable[[Sample], Judged]
SMALL = 128
"""Images of so few pixels are shown enlarged, with sharp edges."""


def write_page(
    path: Path,
    runs: Sequence[Run],
    *,
    examples: int = 8,
    evaluation: dict[str, Any] | None = None,
    judge: Judge | None = None,
    template: str = "report/report.html.j2",
    loader: BaseLoader | None = None,
    **more: Any,
) -> None:
    """Write the page of some runs, with up to `examples` prompts.

    `evaluation` is what is in evaluation.json. Another `template`, found by its `loader`, may extend this package's
    and gets `more`.
    """
    if path.is_file() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise OccupiedError(f"--output: {path} is no page of {GENERATOR}; choose another name")
    own = PackageLoader("trl_llava.tools", ".")
    environment = Environment(
        loader=own if loader is None else ChoiceLoader([loader, own]),
        autoescape=True,  # texts of models and data are text, whatever they hold
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stages = [_stage(stage, runs, examples, judge or unjudged) for stage in dict.fromkeys(run.stage for run in runs)]
    page = environment.get_template(template).render(
        generator=GENERATOR,
        title=", ".join(run.name for run in runs),
        runs=runs,
        stages=stages,
        evaluation=evaluation_table(runs, evaluation),
        **more,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)


def unjudged(sample: Sample) -> Judged:
    """A completion of which nobody knows what is wrong."""
    return [(sample.completion, False)], ""


def _stage(stage: str, of: Sequence[Run], examples: int, judge: Judge) -> dict[str, Any]:
    runs = [run for run in of if run.stage == stage]
    shown, unshared = _examples(runs, examples, judge)
    made_of = _rows([{"base": run.base, **run.made_of} for run in runs])
    versions = _rows([run.versions for run in runs])
    differences = _unlike(made_of) | _recipe_differences(runs) | _unlike(versions)
    return {
        "name": stage.upper() if len(stage) < 5 else stage.capitalize(),
        "kind": TITLES[stage],
        "runs": runs,
        "differences": differences,
        "alike": {name: values[:1] for name, values in made_of.items() if name not in differences},
        "versions": {name: values[:1] for name, values in versions.items() if name not in differences},
        "curves": _curves(stage, runs),
        "reward_and_length": _reward_and_length(stage, runs),
        "examples": shown,
        "unshared": unshared,
    }


def _rows(tables: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Field -> its values, one for each table; a dash where a table has none."""
    return {name: [t.get(name, "-") for t in tables] for name in dict.fromkeys(name for t in tables for name in t)}


def _unlike(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _recipe_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The fields of the recipes that are not alike in all runs.

    Versions differ in the fields they know: one that a recipe lacks counts only where another was given it.
    """
    rows = _rows([run.recipe for run in runs])
    known = [name for name in rows if name not in NOT_COMPARED and all(name in run.recipe for run in runs)]
    given = {name for run in runs for name in run.given} - NOT_COMPARED
    return _unlike({name: values for name, values in rows.items() if name in given or name in known})


def _curves(stage: str, runs: Sequence[Run]) -> list[Chart]:
    logged = dict.fromkeys(name for run in runs for entry in run.log for name in entry)
    terms = {
        f"Reward: {name[8:-5]}": name for name in logged if name.startswith("rewards/") and name.endswith("/mean")
    }
    first, *others = CURVES[stage].items()
    panels = dict([first, *terms.items(), *others])
    found: dict[str, list[Series]] = {}
    for place, run in enumerate(runs):
        for title, (training, held_out) in curves_of(panels, run.log).items():
            series = found.setdefault(title, [])
            series += [Series(run.name, training, place)] * bool(training)
            series += [Series(f"{run.name}, held out", held_out, place, marked=True)] * bool(held_out)
    return [lines(title, found[title]) for title in panels if title in found]


def _reward_and_length(stage: str, runs: Sequence[Run]) -> list[Chart]:
    """Whether longer completions score higher: over the training's steps, and among the last samples."""
    reward, length = (CURVES[stage].get(title, "") for title in ("Reward", "Completion length (tokens)"))
    steps, samples = [], []
    for place, run in enumerate(runs):
        logged = [entry for entry in run.log if entry.get(reward) is not None and entry.get(length) is not None]
        steps += [Series(run.name, [(entry[length], entry[reward]) for entry in logged], place)] * bool(logged)
        for step in sorted({sample.step for sample in run.samples})[-1:]:
            table = [sample for sample in run.samples if sample.step == step and sample.scores]
            points = [(len(sample.completion.split()), _reward(sample)) for sample in table]
            known = [point for point in points if math.isfinite(point[1])]
            samples += [Series(f"{run.name}, step {step}", known, place)] * bool(known)
    charts = [scatter("Each step of training", steps, "tokens", "reward")] if steps else []
    return charts + ([scatter("Each of the last sample completions", samples, "words", "reward")] if samples else [])


def _reward(sample: Sample) -> float:
    """PPO's `score`; of TRL's tables, which have no sum, the first reward."""
    return sample.scores.get("score", next(iter(sample.scores.values())))


def _examples(runs: Sequence[Run], count: int, judge: Judge) -> tuple[list[dict[str, Any]], bool]:
    """The first prompts that all runs were asked at last, and whether there were none, so that each is on its own."""
    asked = [dict.fromkeys(s.asked for s in run.samples if s.step == run.samples[-1].step) for run in runs]
    every = list(dict.fromkeys(key for own in asked for key in own))
    shared = [key for key in every if all(key in own for own in asked if own)]
    return [example_of(key, runs, judge) for key in (shared or every)[:count]], bool(every and not shared)


def example_of(asked: tuple[Any, ...], runs: Sequence[Run], judge: Judge) -> dict[str, Any]:
    """One prompt: the start (once, if all runs start alike), the end of each run, and what lies between."""
    images, image_names, prompt, captions = asked
    starts, ends, rest = [], [], []
    for place, run in enumerate(runs):
        own = [sample for sample in run.samples if sample.asked == asked]
        last = next((sample for sample in own if sample.step == run.samples[-1].step > 0), None)
        first = next((sample for sample in own if sample.step == 0), None)
        starts += [(place, run.name, first)] if first else []
        ends += [(place, run.name, last)] if last else []
        rest += [(place, run.name, sample) for sample in own if sample is not first and sample is not last]
    groups = [[one] for one in starts]
    if len({sample.completion for _, _, sample in starts}) == 1:
        groups = [starts]
    return {
        "prompt": prompt,
        "captions": captions,
        "image_names": image_names,
        "images": [picture(image) for image in images],
        "answers": [_answer(one, judge, len(runs)) for one in (*groups, *([end] for end in ends))],
        "between": [_answer([one], judge, len(runs)) for one in rest],
    }


def _answer(alike: list[tuple[int, str, Sample]], judge: Judge, runs: int) -> dict[str, Any]:
    """A completion, which several of the runs may have given, with the scores that it got from each."""
    place, name, sample = alike[0]
    pieces, remark = judge(sample)
    when = "start" if sample.step == 0 else f"step {sample.step}"
    scores = {name: _named(sample.scores) for _, name, sample in alike}
    if len(set(scores.values())) == 1:
        scores = {"": next(iter(scores.values()))}
    return {
        "label": f"{name}, {when}" if runs > 1 and len(alike) == 1 else when,
        "place": place,
        "start": sample.step == 0,
        "pieces": [piece for piece in pieces if piece[0]],
        "remark": remark,
        "scores": scores,
    }


def _named(scores: dict[str, float]) -> str:
    return ", ".join(
        f"{name.removeprefix('rewards/')}\N{NO-BREAK SPACE}{number(value)}" for name, value in scores.items()
    )


def picture(image: bytes) -> dict[str, Any]:
    """An image's file as a data URL, and whether it is small."""
    return {"url": data_url(image), "small": max(Image.open(io.BytesIO(image)).size) <= SMALL}
