"""`trl-llava check-data`: every row of a recipe read as its run would read it, with the processor and without a model.

    trl-llava check-data --config recipes/llava-1.5-7b-hf/ppo.yaml [--field value ...]

Exit status: 0 if a run could start, 1 if it would fail, 2 if the command line or the recipe cannot be used.
"""

import argparse
import math
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from transformers import ProcessorMixin
from trl.scripts.utils import DatasetConfig

from trl_llava.configs.recipe import make_parser
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments
from trl_llava.data.collators import PromptCollator, SFTCollator
from trl_llava.data.contract import NO_CAPTIONS, TIE, Stage
from trl_llava.data.image_places import moves_images
from trl_llava.data.images import set_limits
from trl_llava.data.lengths import LengthMeter, length_limit
from trl_llava.data.preference_collators import DPOCollator, PreferenceCollator
from trl_llava.data.row_maker import RowMaker
from trl_llava.data.sources import RawRows, read_source
from trl_llava.data.splits import check_batch, check_held_out, check_margins, named_sources
from trl_llava.errors import NotFoundError, RecipeError
from trl_llava.hub.lookup import check_there
from trl_llava.hub.names import split_revision
from trl_llava.models.families import family_of_processor
from trl_llava.models.longest_row import positions_of
from trl_llava.models.model_inputs import counts_images
from trl_llava.models.starts import load_recipe_processor
from trl_llava.ppo.roles import load_policy_processor
from trl_llava.ppo.vllm_prompts import require_served
from trl_llava.prompts import render
from trl_llava.rewards.reward_loading import find_function
from trl_llava.rewards.reward_settings import shows_captions
from trl_llava.tools.check_data.check_report import SourceReport, print_report
from trl_llava.tools.check_data.row_check import FOUND, RowCheck
from trl_llava.tools.recipe_stage import find_stage

ROWS_OF: dict[str, Stage] = {
    **{"sft": "sft", "reward": "preference", "dpo": "preference"},
    **dict.fromkeys(("ppo", "grpo", "rloo"), "prompt"),
}
"""Which rows each stage reads."""


@dataclass
class Check:
    """What a recipe's rows are held against."""

    stage: str
    script_args: LlavaScriptArguments
    args: Any  # the stage's config: `overlong`, `dataset_num_proc`
    sources: list[DatasetConfig]  # the one for evaluation last
    train_sources: int  # how many of them are trained on
    collator: Any  # makes the batches of the run; knows processor and limit
    positions: int | None  # that the model has for a row, where its config says it
    require_captions: bool  # False also where the reward model is not there yet
    one_image_for: str | None  # who reads a row's images one by one, so that a run refuses rows with several
    test_split_size: float | None
    samples: int  # how many prompts of each data set are shown
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what stops no run, but may surprise


def main(argv: Sequence[str]) -> int:
    """Check the rows of one recipe, and print what was found; the exit status is 1 if a run would fail, else 0."""
    options, words = _make_parser().parse_known_args(list(argv))
    console = Console(soft_wrap=True)
    try:
        check = prepare(options.stage or find_stage(words), words, options.processor, options.samples)
    except RecipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        console.print(f"a run would fail: {error}", style="bold red", markup=False)
        return 1
    reports = [check_source(check, source) for source in check.sources]
    trained_on = reports[: check.train_sources]
    try:
        check_margins([report.name for report in trained_on], [report.has_margin for report in trained_on])
    except RecipeError as error:
        check.failures.append(str(error))
    left = sum(report.usable - report.over_limit for report in reports)
    try:
        rows = sum(report.usable - report.over_limit for report in trained_on)
        if check.test_split_size is not None and left:
            check_held_out(check.test_split_size, left)
            rows -= math.ceil(check.test_split_size * (rows if check.test_split_size < 1 else 1))
        check_batch(check.args, rows)
        _note_short_epoch(check, rows)
    except RecipeError as error:
        check.failures.append(str(error))
    print_report(console, reports, check.failures, check.collator, check.notes)
    return 1 if check.failures else 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-llava check-data",
        usage="%(prog)s --config recipe.yaml [--field value ...]",
        description="Walks all rows of a recipe as its run would read them, without a model.",
        epilog="Fields of the recipe's stage can be overridden, dataset_num_proc (processes) among them.",
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=sorted(ROWS_OF), help="the recipe's stage, if its file name does not say")
    parser.add_argument("--processor", help="instead of the recipe's, before stage 1 has run: Hub ID or folder")
    parser.add_argument(
        "--samples", type=int, default=2, help="rendered prompts to show of each data set (default: 2)"
    )
    return parser


def prepare(stage: str, words: list[str], processor_name: str | None = None, samples: int = 2) -> Check:
    """What the rows of a recipe are held against; `processor_name` takes the place of the recipe's processor."""
    # Nothing is trained, so a recipe for GPUs can be checked anywhere.
    here = ["--use_cpu", "--bf16", "false", "--fp16", "false"]
    parser = make_parser(stage, f"trl-llava check-data ({stage})")
    script_args, args, model_args, mixture, _ = parser.parse([*words, *here])
    model_args.trust_remote_code = args.trust_remote_code
    sources, eval_source = named_sources(script_args, mixture, args)
    for path in getattr(args, "reward_funcs", None) or []:
        find_function(path)
    set_limits(script_args.max_image_pixels, script_args.follow_image_links)
    missing = _not_there_yet(args, model_args)
    if processor_name is None and any("sft_model_path" in problem for problem in missing):
        raise NotFoundError(
            f"{'; '.join(missing)}. To check the rows before stage 1 has run, name the base's processor with "
            "--processor, and its --chat_template_path if stage 1's recipe has one"
        )
    processor = _load_processor(processor_name, stage, args, model_args)
    if stage == "ppo" and args.use_vllm:
        name = processor_name or args.sft_model_path or model_args.model_name_or_path
        require_served(family_of_processor(processor), name)
    return Check(
        stage=stage,
        script_args=script_args,
        args=args,
        sources=[*sources, *([eval_source] if eval_source else [])],
        train_sources=len(sources),
        collator=_make_collator(stage, args, processor),
        positions=_positions(processor_name, args, model_args),
        require_captions=_require_captions(stage, args),
        one_image_for=_one_image_for(stage, args, processor),
        test_split_size=mixture.test_split_size,
        samples=samples,
        failures=missing if processor_name is None else [],
        notes=missing if processor_name is not None else [],
    )


def _positions(processor_name: str | None, args: Any, model_args: LlavaModelConfig) -> int | None:
    name = processor_name or getattr(args, "sft_model_path", None) or model_args.model_name_or_path
    room = getattr(args, "response_length", None) or getattr(args, "max_completion_length", None) or 0
    revision = model_args.model_revision if name == model_args.model_name_or_path else None
    return positions_of(name, room=room, revision=revision, trust=model_args.trust_remote_code)


def _not_there_yet(args: Any, model_args: LlavaModelConfig) -> list[str]:
    """What a run starts from and an earlier stage has yet to write."""
    problems = []
    for owner, name in (
        *((args, name) for name in ("sft_model_path", "reward_model_path", "value_model_path")),
        (model_args, "adapter_name_or_path"),
    ):
        path, revision = getattr(owner, name, None), name.replace("_path", "_revision").replace("_name_or", "")
        try:
            if path is not None:
                check_there(f"`{name}`", path, getattr(owner, revision, None))
        except NotFoundError:
            problems.append(f"`{name}`: {path} is not there (has the stage run that writes it?)")
    return problems


def _note_short_epoch(check: Check, rows: int) -> None:
    step = check.args.per_device_train_batch_size * check.args.gradient_accumulation_steps
    if ROWS_OF[check.stage] != "prompt" and 0 < rows < step:
        check.notes.append(f"{rows} rows are fewer than the {step} of one optimizer step: an epoch is one small step")


def _load_processor(given: str | None, stage: str, args: Any, model_args: LlavaModelConfig) -> ProcessorMixin:
    if given is not None:
        model_args.model_name_or_path, model_args.model_revision = split_revision("--processor", given)
    elif stage == "ppo":
        return load_policy_processor(args, model_args)
    return load_recipe_processor(model_args, args.chat_template_path)


def _make_collator(stage: str, args: Any, processor: ProcessorMixin) -> Any:
    if stage == "sft":
        return SFTCollator(processor, max_length=args.max_length, labels_on=args.labels_on)
    if stage == "dpo":
        return DPOCollator(processor, max_length=args.max_length)
    if stage == "reward":
        return PreferenceCollator(processor, args.max_length, judging_prompt=args.make_judging_prompt())
    return PromptCollator(processor, max_prompt_length=args.max_prompt_length)


def _require_captions(stage: str, args: Any) -> bool:
    if ROWS_OF[stage] != "prompt":
        return bool(getattr(args, "with_captions", False))
    return bool(shows_captions(args.reward_model_path, args.reward_model_revision))


def _one_image_for(stage: str, args: Any, processor: ProcessorMixin) -> str | None:
    if not counts_images(processor):
        return None  # to it, several images are so many times one
    if stage in ("grpo", "rloo"):
        return "TRL's trainer"
    return "vLLM" if stage == "ppo" and args.use_vllm else None


def check_source(check: Check, source: DatasetConfig) -> SourceReport:
    """Walk one data set."""
    report = SourceReport(source.path if source.split == "train" else f"{source.path} ({source.split})")
    arguments = check.script_args
    try:
        raw = read_source(source)
        folder, captions_file = arguments.image_folder or raw.image_folder, arguments.captions_file
        maker = RowMaker.of(
            raw,
            ROWS_OF[check.stage],
            folder,
            captions_file,
            check.require_captions,
            decode=True,
            captions_column=arguments.captions_column,
            rating=arguments.rating,
            fetch_images=arguments.fetch_images,
        )
    except (ValueError, OSError) as error:
        check.failures.append(str(error))
        return report
    report.unread, report.has_margin = maker.unread, "margin" in maker.features
    found = raw.dataset.with_format("arrow").map(
        RowCheck(maker, LengthMeter(check.collator), check.one_image_for).batch,
        batched=True,
        batch_size=64,
        with_indices=True,
        remove_columns=raw.dataset.column_names,
        features=FOUND,
        num_proc=min(check.args.dataset_num_proc or len(os.sched_getaffinity(0)), len(raw.dataset)),
        load_from_cache_file=False,
        desc=f"Checking {raw.name}",
    )
    _count(check, report, found.with_format(None)[:])
    usable = [i for i, tokens in enumerate(report.tokens) if tokens]
    drawn = random.Random(0).sample(usable, min(check.samples, len(usable)))
    report.samples = [_sample(check, raw, maker, i) for i in sorted(drawn)]
    return report


def _count(check: Check, report: SourceReport, found: dict[str, list[Any]]) -> None:
    limit, allowed = length_limit(check.collator, check.positions)
    bad = [i for i, reason in enumerate(found["reason"]) if reason]
    good = [i for i, reason in enumerate(found["reason"]) if not reason]
    report.rows, report.usable = len(found["reason"]), len(good)
    report.reasons = Counter(found["reason"][i] for i in bad)
    for i in reversed(bad):
        report.examples[found["reason"][i]] = found["problem"][i]
    report.answer_types = Counter(found["answer_type"][i] for i in good if found["answer_type"][i])
    report.text_only = sum(not found["images"][i] for i in good)
    bare = sum(not found["captions"][i] for i in good)
    report.without_captions = report.reasons[NO_CAPTIONS] + (bare if ROWS_OF[check.stage] != "sft" else 0)
    report.moved = sum(found["text_first"][i] for i in good) if moves_images(check.collator.processor) else 0
    report.tokens, report.text_tokens = found["tokens"], found["text_tokens"]
    report.over_limit = 0 if limit is None else sum(found["tokens"][i] > limit for i in good)

    faulty = [i for i in bad if found["reason"][i] != TIE]
    if faulty and check.script_args.on_bad_row == "error":
        first = found["problem"][faulty[0]]
        check.failures.append(f"{len(faulty)} of {report.rows} rows of {report.name} cannot be used, first {first}")
    elif len(bad) == report.rows:
        check.failures.append(f"none of the {report.rows} rows of {report.name} can be used")
    elif unskipped := [i for i in bad if found["loaded"][i]]:
        first = found["problem"][unskipped[0]]
        check.failures.append(f"{len(unskipped)} rows of {report.name} cannot be encoded, first {first}")
    if report.over_limit and (check.args.overlong == "error" or report.over_limit == len(good)):
        check.failures.append(
            f"{report.over_limit} of {report.rows} rows of {report.name} are too long: {allowed} tokens, and "
            f"overlong is `{check.args.overlong}`"
        )


def _sample(check: Check, raw: RawRows, maker: RowMaker, index: int) -> tuple[str, str]:
    """A row's name, and the text that the model reads of it, image tokens counted; of a pair the chosen one's."""
    (record,) = raw.dataset.with_format("arrow")[index : index + 1].to_pylist()
    row = maker.row(record, index)
    processor = check.collator.processor
    flags = {name: flag for name, flag in check.collator.rendering().items() if name != "assistant_turns"}
    text = render(processor, check.collator.conversations(row)[0], **flags)
    for expansion in LengthMeter(check.collator).expansions(row):
        token = processor.image_token
        text = re.sub(f"{re.escape(token)}(?![*])", f"{token}*{expansion.count(token)}", text, count=1)
    return row["row_name"], text
