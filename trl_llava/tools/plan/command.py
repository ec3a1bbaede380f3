"""`trl-llava plan`: the memory that a recipe will need, part by part, and the settings that fit a GPU.

    trl-llava plan --config recipes/llava-1.5-7b-hf/sft.yaml --gpu-memory 24 [--json FILE] [--field value ...]

Models are built from their config.json, without weights; a step is run on tensors that have a shape and no memory.
Exit status: 0 if the recipe fits, 1 if it does not, 2 if the command line or the recipe cannot be used.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from trl_llava.configs.shipped import recipe_path
from trl_llava.errors import InputError, RecipeError
from trl_llava.ppo.generation_batches import GIB
from trl_llava.run.console import quiet_libraries
from trl_llava.tools.plan.job import Job, Need, Settings
from trl_llava.tools.plan.ppo import ppo_need
from trl_llava.tools.plan.processes import find_processes
from trl_llava.tools.plan.report import Plan, as_dict, describe, print_fitting, print_need
from trl_llava.tools.plan.starts import Sources, read_recipe
from trl_llava.tools.plan.supervised import supervised_need
from trl_llava.tools.recipe_stage import find_stage

STAGES = ("sft", "reward", "ppo")


def main(argv: Sequence[str]) -> int:
    """Prints the plan of one recipe.

    Args:
        argv: Options, recipe and overrides.

    Returns:
        Exit status: 0, or 1 if the recipe does not fit as it is.

    Raises:
        RecipeError: If the command line or the recipe cannot be used.
        InputError: If a model is of a kind that the plan does not know.
        NotFoundError: If the config of a model cannot be read.
    """
    options, words = make_parser().parse_known_args(list(argv))
    check_options(options)
    job, settings = read_job(options, words)
    console = Console(soft_wrap=True)
    own = need_of(job, settings)
    print_need(console, job, settings, own, options.gpu_memory, options.reserve)
    plan = make_plan(job, settings, own)
    print_fitting(console, plan)
    if options.json:
        text = json.dumps(as_dict(plan, options.gpu_memory, options.reserve), indent=2) + "\n"
        Path(options.json).write_text(text, encoding="utf-8")
    return 0 if plan.fits else 1


class _Parser(argparse.ArgumentParser):
    """Argparse, with an error like every other instead of its exit."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"command line: {message}. `trl-llava plan --help` shows the options.")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trl-llava plan",
        usage="%(prog)s --config recipe.yaml --gpu-memory GIB [--field value ...]",
        description="Memory of a recipe by part, and the settings that fit. Nothing is loaded but config.json.",
        epilog="Fields of the recipe's stage can be overridden.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu-memory", "--gpu_memory", type=float, required=True, help="of one GPU, in GiB")
    parser.add_argument("--stage", choices=STAGES, help="the recipe's stage, if its file name does not say")
    parser.add_argument(
        "--reserve",
        type=float,
        default=1.0,
        help="GiB of --gpu-memory that stay free, for CUDA itself and fragmentation (default: 1)",
    )
    parser.add_argument("--length", type=int, help="tokens of the longest row (PPO: prompt) instead of the recipe's")
    parser.add_argument("--images_per_row", type=int, default=1, help="images per row (default: 1)")
    parser.add_argument("--base", help="base model where one is not there yet: Hub ID or folder")
    parser.add_argument("--judged_length", type=int, help="PPO: tokens that the reward model reads of a row")
    parser.add_argument("--shared_length", type=int, help="reward: tokens that a pair begins with (the image's)")
    parser.add_argument("--num_processes", type=int, help="processes, one GPU each (default: 1)")
    parser.add_argument("--accelerate_config", help="as for the stages: a file, or a name in accelerate_configs/")
    parser.add_argument("--json", metavar="FILE", help="write the same as JSON")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuses sizes that no machine has, before anything is planned."""
    for name in ("length", "judged_length", "shared_length", "num_processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RecipeError(f"command line: --{name} must be at least 1, found {value}.")
    if options.images_per_row < 0:
        raise RecipeError(f"command line: --images_per_row must be 0 or more, found {options.images_per_row}.")
    if not 0 < options.gpu_memory < float("inf"):
        raise RecipeError(f"command line: --gpu-memory must be above 0 (GiB), found {options.gpu_memory:g}.")
    if not 0 <= options.reserve < options.gpu_memory:
        raise RecipeError(
            f"command line: --reserve must be 0 or more and below --gpu-memory ({options.gpu_memory:g}), found "
            f"{options.reserve:g}."
        )
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise RecipeError(f"command line: --json {options.json}: there is no folder {Path(options.json).parent}.")


def read_job(options: argparse.Namespace, words: list[str]) -> tuple[Job, Settings]:
    """The stage and the settings of a recipe; `words` are `--config` and overrides."""
    stage = options.stage or find_stage(words)
    if stage not in STAGES:
        raise RecipeError(
            f"this is a recipe for {stage}, whose step is TRL's own and not modelled here; a plan can be made for "
            f"{', '.join(STAGES)}."
        )
    args, model_args = read_recipe(stage, words)
    quiet_libraries(args)
    limit = "max_prompt_length" if stage == "ppo" else "max_length"
    length = options.length or getattr(args, limit)
    if not length:
        raise RecipeError(f"`{limit}` is not set, so the longest row is not known: set it, or give --length.")
    job = Job(
        stage=stage,
        args=args,
        model_args=model_args,
        processes=find_processes(options.accelerate_config, options.num_processes),
        images=options.images_per_row,
        length=length,
        sources=Sources(options.base, recipe_path(words), model_args.trust_remote_code),
        limit=int((options.gpu_memory - options.reserve) * GIB),
        judged_length=options.judged_length,
        shared_length=options.shared_length,
    )
    settings = Settings(
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=args.gradient_checkpointing,
        four_bit=model_args.load_in_4bit,
        rollout_rows=getattr(args, "local_rollout_forward_batch_size", None),
    )
    return job, settings


def need_of(job: Job, settings: Settings) -> Need:
    """What a step needs with these settings, of one process."""
    if settings.checkpointing and (job.args.gradient_checkpointing_kwargs or {}).get("offload"):
        raise InputError("gradient_checkpointing_kwargs: what `offload` takes is not known here; plan without it")
    return ppo_need(job, settings) if job.stage == "ppo" else supervised_need(job, settings)


def make_plan(job: Job, settings: Settings, own: Need) -> Plan:
    """Finds out which settings with the same rows per step fit; `own` is what the recipe's own settings need."""
    known = {settings: own}
    found = [_largest(job, choice, known) for choice in _choices(job, settings)]
    fitting = [(choice, known[choice].worst.total) for choice in found if choice is not None]
    least = min(known, key=lambda tried: known[tried].worst.total)
    return Plan(job, settings, own, fitting, (least, known[least].worst.total))


def first_that_fits(job: Job, settings: Settings) -> tuple[Settings, int] | None:
    """The largest micro-batch with checkpointing, in 4 bits only where 16 do not fit, and its bytes: few dry runs."""
    known: dict[Settings, Need] = {}
    for choice in _choices(job, settings):
        if choice.checkpointing and (found := _largest(job, choice, known)) is not None:
            return found, known[found].worst.total
    return None


def _choices(job: Job, settings: Settings) -> Iterator[Settings]:
    """With and without checkpointing and 4 bits, faster ones first; 4 bits only where an adapter is trained."""
    fields = job.model_args
    adapter = fields.use_peft or fields.adapter_name_or_path or getattr(job.args, "sft_model_path", None)
    for four_bit in dict.fromkeys((settings.four_bit, bool(adapter) or settings.four_bit)):
        for checkpointing in (False, True):
            yield replace(settings, four_bit=four_bit, checkpointing=checkpointing)


def _largest(job: Job, choice: Settings, known: dict[Settings, Need]) -> Settings | None:
    """The largest micro-batch that fits and keeps the rows of a step; `known` keeps the dry runs.

    Two of them show what a phase holds whatever the rows, and at least for each row: more rows may have another moment
    that is the worst. So the largest that may fit is run dry too, and if it does not fit after all, the next one.
    """
    assert job.limit is not None
    total = choice.rows * choice.accumulation

    def with_rows(rows: int) -> Settings:
        at_once = None if choice.rollout_rows is None else rows
        return replace(choice, rows=rows, accumulation=total // rows, rollout_rows=at_once)

    def need(rows: int) -> dict[str, int]:
        settings = with_rows(rows)
        if settings not in known:
            print(f"planning {describe(settings)} ...", file=sys.stderr)
            known[settings] = need_of(job, settings)
        return known[settings].totals

    one = need(1)
    if max(one.values()) > job.limit:
        return None
    sizes = [rows for rows in range(2, total + 1) if total % rows == 0]
    if sizes:
        # The last size has no accumulation, where gradients come as activations go: it is no guide to the others.
        second = sizes[0]
        each = {phase: (bytes_ - one[phase]) / (second - 1) for phase, bytes_ in need(second).items()}
        for rows in reversed(sizes):
            guess = max(one[phase] + (rows - 1) * more for phase, more in each.items())
            if guess <= job.limit and max(need(rows).values()) <= job.limit:
                return with_rows(rows)
    return with_rows(1)
