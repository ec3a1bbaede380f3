"""What only the base can tell: which template it needs, how long the rows are, and how many fit a card at once."""

import contextlib
import io
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import ProcessorMixin

from trl_llava.configs.recipe import read_recipe
from trl_llava.configs.shipped import shipped_folder
from trl_llava.data.collators import SFTCollator
from trl_llava.data.lengths import LengthMeter
from trl_llava.errors import ExplainedError, InputError, NotFoundError
from trl_llava.models.chat_templates import VICUNA_V1
from trl_llava.models.load import load_processor
from trl_llava.tools.check_data.check_data import check_source, prepare
from trl_llava.tools.init.recipes import Recipe, Values
from trl_llava.tools.plan.command import first_that_fits, make_parser, read_job
from trl_llava.tools.plan.report import fields_of

OF_THE_MODEL = ("chat_template_path", "pad_to_square")
"""Keys of a shipped recipe that belong to its base."""


def model_values(base: str, on_cpu: bool) -> tuple[Values, ProcessorMixin | None, str | None]:
    """The keys of a base, with a template that ends completions; its processor, or why there is none here."""
    values: Values = {"model_name_or_path": base, "dtype": "float32" if on_cpu else "bfloat16"}
    for path in shipped_folder("recipes").glob("*/sft.yaml"):
        recipe = read_recipe(str(path))
        if recipe["model_name_or_path"] == base:
            values |= {key: recipe[key] for key in OF_THE_MODEL if key in recipe}
    template = values.get("chat_template_path")
    try:
        processor = load_processor(base, chat_template_path=template)
    except NotFoundError as error:
        return values, None, " ".join(str(error).split())
    if template is None and not _ends_turns(processor):
        values["chat_template_path"] = VICUNA_V1
        processor = load_processor(base, chat_template_path=VICUNA_V1)
        if not _ends_turns(processor):
            raise InputError(
                f"--base {base}: neither its own chat template nor {VICUNA_V1} ends a completion with a special "
                "token, so the policy would not learn to stop. Choose another base."
            )
    return values, processor, None


def _ends_turns(processor: ProcessorMixin) -> bool:
    messages = {"prompt": [_message("user", "Hi")], "completion": [_message("assistant", "Ho")]}
    try:
        LengthMeter(SFTCollator(processor, max_length=None)).measure([{"row_name": "", "images": [], **messages}])
    except InputError:
        return False
    return True


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def measure(recipe: Recipe, model: Values, *, require_captions: bool) -> list[str]:
    """Read all rows of a recipe as its run will; sets its limit of length, and returns what is to be said.

    Rows that cannot be used are left out by the recipe (`on_bad_row`).
    """
    words = ["--config", str(recipe.path), "--on_bad_row", "skip"]
    if template := model.get("chat_template_path"):
        words += ["--chat_template_path", template]
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        check = prepare(recipe.stage, words, model["model_name_or_path"], samples=0)
        check.require_captions = check.require_captions or require_captions
        report = check_source(check, check.sources[0])
    if check.failures:
        first = next((f"; first {text}" for text in report.examples.values()), "")
        raise InputError(f"{recipe.rows.name}: {check.failures[0]}{first}")
    said = []
    if bad := sum(report.reasons.values()):
        recipe.set(on_bad_row="skip")
        _, first = next(iter(report.examples.items()))
        said.append(
            f"{bad} of {report.rows} rows of {recipe.rows.name} cannot be used and are left out, first {first}"
        )
    limit = "max_prompt_length" if recipe.stage == "ppo" else "max_length"
    longest = max(report.tokens)
    recipe.groups[next(name for name in recipe.groups if name == "Rows")][limit] = 64 * math.ceil(longest / 64)
    recipe.notes.append(f"Rows:     {report.usable} of {recipe.rows.name}; the longest has {longest} tokens.")
    return said


def response_length(processor: ProcessorMixin, completions: Sequence[str]) -> int:
    """Room for completions half as long again as the longest known one, from 32 to 512 tokens."""
    longest = max((len(processor.tokenizer(text)["input_ids"]) for text in completions), default=256)
    return min(512, max(32, 8 * math.ceil(1.5 * longest / 8)))


def fit(recipes: Mapping[str, Recipe], gpu_memory: float) -> list[str]:
    """Sets the micro-batches that fit a card, PPO's first, as all stages share its precision; returns what to say."""
    said = []
    for stage in ("ppo", "reward", "sft"):
        if stage not in recipes:
            continue
        recipe = recipes[stage]
        print(f"planning {stage} for {gpu_memory:g} GiB (a 7B base takes minutes) ...", file=sys.stderr)
        words = ["--config", str(recipe.path), "--gpu-memory", str(gpu_memory)]
        try:
            job, settings = read_job(*make_parser().parse_known_args(words))
            with contextlib.redirect_stderr(io.StringIO()):
                fitting = first_that_fits(job, settings)
        except ExplainedError as error:
            said.append(f"{stage} is not planned, its micro-batches are of one row: {' '.join(str(error).split())}")
            continue
        if fitting is None:
            said.append(f"{stage} does not fit {gpu_memory:g} GiB even in 4 bits: choose a smaller --base")
            continue
        chosen, need = fitting
        recipe.notes.append(f"Memory:   {need / 2**30:.2g} of {gpu_memory:g} GiB, by `trl-llava plan`.")
        recipe.set(**{key: _typed(value) for key, value in fields_of(chosen).items()})
        if chosen.four_bit:
            for other in recipes.values():
                other.set(load_in_4bit=True)
    return said


def _typed(value: str) -> bool | int:
    return value == "true" if value in ("true", "false") else int(value)
