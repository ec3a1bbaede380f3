"""The training and evaluation rows that a recipe names: one data set, or a mixture of several."""

import math
import random
from typing import Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import TrainingArguments
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from trl_llava.configs.stages import LlavaScriptArguments
from trl_llava.data.contract import Stage
from trl_llava.data.images import set_limits
from trl_llava.data.load import load_rows
from trl_llava.errors import RecipeError


def load_splits(
    script_args: LlavaScriptArguments,
    mixture: DatasetMixtureConfig,
    training_args: TrainingArguments,
    stage: Stage,
    *,
    require_captions: bool = False,
    dataset_num_proc: int | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Load and check a recipe's rows; each process reads what the first one has prepared.

    The evaluation rows are `test_split_size` rows taken out of the training rows (a share, or a number from 1 on),
    else `dataset_test_split`. They are loaded when `test_split_size` or `eval_strategy` asks for them, else None. Of
    `training_args`, `eval_strategy` and the seeds are read.
    """
    train_sources, eval_source = named_sources(script_args, mixture, training_args)
    set_limits(script_args.max_image_pixels, script_args.follow_image_links)

    def load(source: DatasetConfig) -> Dataset:
        return load_rows(
            source,
            stage,
            image_folder=script_args.image_folder,
            captions_file=script_args.captions_file,
            captions_column=script_args.captions_column,
            rating=script_args.rating,
            fetch_images=script_args.fetch_images,
            on_bad_row=script_args.on_bad_row,
            require_captions=require_captions,
            num_proc=dataset_num_proc,
        )

    with PartialState().main_process_first():
        parts = [load(source) for source in train_sources]
        check_margins([source.path for source in train_sources], ["margin" in part.column_names for part in parts])
        train = concatenate_datasets(_keep_fractions(train_sources, parts, _seed(training_args)))
        if mixture.test_split_size is not None:
            train, held_out = _hold_out(train, mixture.test_split_size, training_args)
            check_batch(training_args, len(train))
            return train, held_out
        check_batch(training_args, len(train))
        return train, load(eval_source) if eval_source is not None else None


def named_sources(
    script_args: LlavaScriptArguments, mixture: DatasetMixtureConfig, training_args: TrainingArguments
) -> tuple[list[DatasetConfig], DatasetConfig | None]:
    """The data sets that a recipe names: those of the training rows, and that of the evaluation rows if it has one."""
    if bool(mixture.datasets) == bool(script_args.dataset_name):
        found = "both are given" if mixture.datasets else "neither is given"
        raise RecipeError(f"name the rows with either `dataset_name` or `datasets`: {found}.")
    if mixture.streaming:
        raise RecipeError("`streaming` must stay false: all rows are checked before training starts.")

    def split(name: str) -> DatasetConfig:
        return DatasetConfig(path=script_args.dataset_name, name=script_args.dataset_config, split=name)

    evaluates = training_args.eval_strategy != "no" and mixture.test_split_size is None
    if evaluates and mixture.datasets:
        raise RecipeError(
            f"`eval_strategy: {training_args.eval_strategy.value}` with `datasets` needs `test_split_size`, the "
            "share or number of rows to hold out."
        )
    sources = mixture.datasets or [split(script_args.dataset_train_split)]
    return sources, split(script_args.dataset_test_split) if evaluates else None


def check_margins(names: list[str], have_margins: list[bool]) -> None:
    """Refuse a mixture in which rows with and without a margin would meet in one batch."""
    if any(have_margins) and not all(have_margins):
        bare = names[have_margins.index(False)]
        raise RecipeError(
            f"`datasets`: {bare} has no margin, but {names[have_margins.index(True)]} has one. Give all of them a "
            "`margin` column, or none (`columns` of an entry says which are read)."
        )


def check_held_out(size: float, rows: int) -> None:
    """Refuse a `test_split_size` that is neither a share nor a number of rows, or leaves no row."""
    if size <= 0 or (size >= 1 and (size != int(size) or size >= rows)):
        raise RecipeError(
            f"`test_split_size` must be a share between 0 and 1 or a whole number below the {rows} rows, found {size}."
        )
    if size < 1 and math.ceil(size * rows) >= rows:
        raise RecipeError(f"`test_split_size: {size}` leaves none of {rows} rows for training: lower it.")


def check_batch(args: TrainingArguments, rows: int) -> None:
    """Refuse rows that are fewer than a batch, where only whole batches are trained on."""
    size, processes = args.per_device_train_batch_size, PartialState().num_processes
    if args.dataloader_drop_last and rows < size * processes:
        across = f" on each of {processes} processes" if processes > 1 else ""
        raise RecipeError(
            f"`dataloader_drop_last` leaves nothing of {rows} rows with `per_device_train_batch_size: {size}`{across}"
            ": lower the batch, or set `dataloader_drop_last` to false."
        )
    step = prompts_of_a_step(args, processes)
    if step is not None and rows < step:
        raise RecipeError(
            f"a step takes {step} prompts, and there are {rows}: lower `per_device_train_batch_size` ({size}) or "
            f"`gradient_accumulation_steps` ({args.gradient_accumulation_steps})."
        )


def prompts_of_a_step(args: Any, processes: int) -> int | None:
    """How many prompts all processes together take at once where completions are generated; None elsewhere."""
    if hasattr(args, "num_generations_per_prompt"):  # PPO
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        return int(rows // args.num_generations_per_prompt)
    if hasattr(args, "generation_batch_size"):  # GRPO, RLOO
        return int(args.generation_batch_size // args.num_generations)
    return None


def _seed(training_args: TrainingArguments) -> int:
    return training_args.seed if training_args.data_seed is None else training_args.data_seed


def _hold_out(rows: Dataset, size: float, training_args: TrainingArguments) -> tuple[Dataset, Dataset]:
    """Splits by the seed; TRL's mixture splits by the global generator."""
    check_held_out(size, len(rows))
    parts = rows.train_test_split(test_size=int(size) if size >= 1 else size, seed=_seed(training_args))
    return parts["train"], parts["test"]


def _keep_fractions(sources: list[DatasetConfig], parts: list[Dataset], seed: int) -> list[Dataset]:
    """As TRL does it: the largest mixture with these shares in which no data set is repeated.

    Where TRL keeps the first rows, the seed draws which ones: published files are sorted by what they are made of.
    """
    given = [source.fraction for source in sources if source.fraction is not None]
    if not given:
        return parts
    if len(given) < len(sources) or min(given) <= 0:
        raise RecipeError("`datasets`: give `fraction`, above 0, for all data sets or for none.")
    shares = [fraction / sum(given) for fraction in given]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    kept = []
    for index, (part, share) in enumerate(zip(parts, shares, strict=True)):
        rows = random.Random(f"{seed} {index}").sample(range(len(part)), round(share * total))
        kept.append(part.select(sorted(rows)))
    return kept
