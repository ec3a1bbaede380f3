"""What a run has left in its folder, and a line for each thing that a page would show and that is not there."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_llava.configs.recipe import DEFAULTS_HEADING, RecipeLoader
from trl_llava.errors import InputError, RecipeError
from trl_llava.ppo.samples import FOLDER
from trl_llava.publish.card_numbers import NUMBERS_FILE, Number, read_numbers
from trl_llava.publish.model_card import made_of
from trl_llava.publish.shareable import FACTS_FILE
from trl_llava.run.alarms import ALARMS_FILE, Alarm
from trl_llava.run.checkpoint_folders import checkpoints, step_of
from trl_llava.run.output_dir import FINISHED_FILE, RECIPE_FILE, VERSIONS_FILE, recipe_in
from trl_llava.tools.report.samples import Sample, read_samples

_FIELD_OF = {
    "ppo": "num_ppo_epochs",
    "grpo": "scale_rewards",
    "rloo": "normalize_advantages",
    "dpo": "precompute_ref_log_probs",
    "reward": "center_rewards_coefficient",
    "sft": "completion_only_loss",
}
"""Stage -> a field that no other stage's recipe has, for runs of versions that wrote no card.json."""
_NO_SAMPLES = {
    "ppo": "no completions of held-out prompts: set `num_sample_generations` and give held-out rows",
    "grpo": "no completions: `log_completions: true` writes them",
    "rloo": "no completions: TRL's RLOO keeps none in the folder",
}


@dataclass(frozen=True)
class Run:
    """A run as its files tell it."""

    name: str
    stage: str
    base: str
    made_of: dict[str, Any]
    recipe: dict[str, Any]
    given: set[str]  # the fields of the recipe that are no defaults
    recipe_texts: tuple[str, str]  # what was given, and the defaults
    versions: dict[str, str]
    log: list[dict[str, Any]]
    progress: str
    samples: list[Sample]
    alarms: list[Alarm]
    numbers: list[Number]
    missing: list[str]


def read_run(path: Path, name: str) -> Run:
    """Read a run, or one of its checkpoints: the run as it was then."""
    checkpoint = step_of(path.absolute()) if step_of(path.absolute()) >= 0 else None
    folder = path.absolute() if checkpoint is None else path.absolute().parent
    if not path.is_dir() or not any((folder / file).is_file() for file in (RECIPE_FILE, FACTS_FILE)):
        raise RecipeError(_no_run(path))
    recipe, texts = _recipe(folder)
    facts = _json(folder / FACTS_FILE, {})
    stage = facts.get("stage") or next((stage for stage, field in _FIELD_OF.items() if field in recipe), None)
    if stage is None:
        raise InputError(f"{path}: its stage is in neither {FACTS_FILE} nor {RECIPE_FILE}: it cannot be shown")
    state, progress = _state(folder, path.absolute(), checkpoint)
    samples, problems = read_samples(folder, checkpoint)
    alarms: list[Alarm] = _json(folder / ALARMS_FILE, [])
    log, numbers = state.get("log_history", []), read_numbers(folder)
    return Run(
        name=name,
        stage=stage,
        base=facts.get("base_model") or recipe.get("model_name_or_path") or "not recorded",
        made_of=made_of(recipe) if recipe else facts["made_of"],
        recipe=recipe,
        given=set(yaml.load(texts[0], Loader=RecipeLoader) or {}),
        recipe_texts=texts,
        versions=_json(folder / VERSIONS_FILE, {}),
        log=log,
        progress=progress,
        samples=samples,
        alarms=[alarm for alarm in alarms if checkpoint is None or alarm["step"] <= checkpoint],
        numbers=numbers,
        missing=[*problems, *_missing(folder, stage, log, samples, numbers)],
    )


def _missing(
    folder: Path, stage: str, log: Sequence[Any], samples: Sequence[Sample], numbers: Sequence[Number]
) -> Iterator[str]:
    """A line for each thing that a page would show, and that is not there."""
    for file, text in {RECIPE_FILE: "recipe", VERSIONS_FILE: "versions"}.items():
        if not (folder / file).is_file():
            yield f"no {text}: there is no {file}"
    if not log:
        yield "no curves: nothing was logged yet"
    if not samples:
        yield _NO_SAMPLES.get(stage, f"no completions: {stage} makes none (`trl-llava generate` does)")
    elif stage == "ppo" and samples[0].step > 0:
        yield f"no completions of the start: the first in {FOLDER}/ are those after step {samples[0].step}"
    if samples and not any(sample.images for sample in samples):
        yield f"no images beside the completions: the tables in {FOLDER}/ hold none"
    if not numbers:
        yield f"no evaluation: there is no {NUMBERS_FILE} (`trl-llava eval --update_card` writes it)"


def _recipe(folder: Path) -> tuple[dict[str, Any], tuple[str, str]]:
    """A run's recipe by field, and its text: what was given, and the defaults."""
    file = folder / RECIPE_FILE
    try:
        recipe = recipe_in(folder)
    except yaml.YAMLError as error:
        raise InputError(f"{file} is damaged: expected YAML ({' '.join(str(error).split())})") from error
    given, _, defaults = (file.read_text(encoding="utf-8") if file.is_file() else "").partition(DEFAULTS_HEADING)
    return recipe, (given.strip(), defaults.strip())


def _no_run(path: Path) -> str:
    if not path.is_dir():
        return f"{path}: there is no such folder; give the `output_dir` of a run."
    inside = ", ".join(sorted(str(file.parent) for file in path.glob(f"*/{RECIPE_FILE}")))
    hint = f"give the runs in it: {inside}" if inside else "give the `output_dir` of a run, or a checkpoint in it"
    return f"{path} is no run of trl_llava (it has neither {RECIPE_FILE} nor {FACTS_FILE}): {hint}."


def _state(folder: Path, path: Path, checkpoint: int | None) -> tuple[dict[str, Any], str]:
    """The trainer's state that says most, and how far the run is."""
    last = next(reversed(checkpoints(folder)), None)
    if checkpoint is not None:
        file, words = path / FINISHED_FILE, f"as it was at {path.name}"
    elif (folder / FINISHED_FILE).is_file():
        file, words = folder / FINISHED_FILE, "finished"
    elif last is not None:
        file, words = last / FINISHED_FILE, f"not finished, shown up to its last checkpoint, {last.name}"
    else:
        return {}, "not finished, and no checkpoint yet"
    state = _json(file, None)
    if state is None:
        raise InputError(f"{path} is no whole checkpoint: it has no {FINISHED_FILE}")
    return state, f"{words} (step {state['global_step']} of {state['max_steps']})"


def _json(file: Path, default: Any) -> Any:
    if not file.is_file():
        return default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged: expected JSON ({error})") from error
