"""The folder of one run: refused when it holds another run, filled with what repeats and explains this one."""

import json
import sys
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from trl_llava.configs.alarms import AlarmOptions
from trl_llava.configs.recipe import Recipe, RecipeLoader
from trl_llava.errors import InputError
from trl_llava.run.atomic_files import write_atomically
from trl_llava.run.checkpoint_folders import checkpoint_to_resume, checkpoints, clear_leftovers, is_leftover
from trl_llava.run.disk_full import explain_full_disk
from trl_llava.run.finished_model import being_written, move_in, room_for_model
from trl_llava.run.process_counts import check_processes
from trl_llava.run.versions import versions

RECIPE_FILE = "recipe.yaml"
VERSIONS_FILE = "versions.json"
FINISHED_FILE = "trainer_state.json"  # written last
NOT_COMPARED = {
    # where it is, how it resumes, when it is saved and what of it is kept
    *("output_dir", "resume_from_checkpoint", "on_damaged_checkpoint", "local_rank", "save_steps", "save_total_limit"),
    # what is logged, when, and where to
    *("report_to", "run_name", "project", "trackio_space_id", "logging_dir", "disable_tqdm"),
    *("log_level", "log_level_replica", "log_on_each_node", "skip_memory_metrics"),
    *("logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter"),
    *("log_completions", "num_completions_to_print"),
    # what goes to the Hub
    *("push_to_hub", "hub_strategy", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision"),
    *("hub_onto_existing", "card_samples"),
    # how rows reach the model
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
    *("dataloader_pin_memory", "dataset_num_proc"),
    # when it gives up, and what it warns of
    "ddp_timeout",
    *(field.name for field in fields(AlarmOptions)),
}
"""Fields in which a run that resumes may differ from what it was: its weights are the same, bit for bit."""


class OutputDirError(InputError):
    """An `output_dir` that this run cannot have."""

    exit_status = 2


def claim(args: TrainingArguments, recipe: Recipe) -> str | None:
    """Make sure that the run may write into `output_dir`, before anything heavy is loaded.

    Returns the checkpoint to resume from, the same on every process, or None to start at the first step.
    """
    folder = Path(args.output_dir)
    found: list[str | None] = [None]
    if args.process_index == 0:  # when another process checks, this one may already have begun to write
        _check_owner(folder, recipe, resuming=wants_resume(args))
        _check_writable(folder)
        clear_leftovers(folder)
        found = [_checkpoint(args, recipe)]
        if found[0] is not None:
            print(f"resuming from {found[0]}", file=sys.stderr)
    return broadcast_object_list(found)[0]


def record(args: TrainingArguments, recipe: Recipe) -> None:
    """Write recipe.yaml and versions.json, when everything is loaded and training is about to start."""
    if args.process_index == 0:
        folder = Path(args.output_dir)
        write_atomically(folder / RECIPE_FILE, recipe.to_yaml())
        write_atomically(folder / VERSIONS_FILE, json.dumps(versions(), indent=2) + "\n")


def finish(trainer: Any, dataset_name: str | None) -> None:
    """Save the finished model, its card (which names the data set) and the log; pushing them is not done here."""
    folder, saves = Path(trainer.args.output_dir), trainer.args.should_save
    last = next(reversed(checkpoints(folder)), None)
    with (
        explain_full_disk(folder, "the finished model", last=last),
        room_for_model(folder) if saves else nullcontext(),
    ):
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(being_written(folder)), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if saves:
            # A pickle, which nobody should load from elsewhere, and PEFT's model card.
            for name in ("training_args.bin", "README.md"):
                (being_written(folder) / name).unlink(missing_ok=True)
            move_in(folder, FINISHED_FILE)
        trainer.create_model_card(dataset_name=dataset_name)
        if saves:
            trainer.state.save_to_json(str(being_written(folder) / FINISHED_FILE))
            (being_written(folder) / FINISHED_FILE).replace(folder / FINISHED_FILE)
    if trainer.is_world_process_zero():
        print(f"finished after step {trainer.state.global_step}; all of it is in {folder}", flush=True)


def wants_resume(args: TrainingArguments) -> bool:
    """Whether to resume: from a checkpoint, or from the first step if the run was killed before it had one."""
    return args.resume_from_checkpoint not in (None, False, "false", "False")


def differences(previous: dict[str, Any], now: dict[str, Any], given: Collection[str]) -> list[str]:
    """One text for each field in which the recipes of two runs differ; where a run is does not count.

    Versions of TRL, transformers and this package differ in the fields they know: one that only one of the recipes has
    counts only where it is `given` now.
    """
    free = NOT_COMPARED
    if now.get("load_best_model_at_end"):  # which is chosen among those that are saved
        free = free - {"save_steps"}
    keys = sorted(((set(previous) & set(now)) | set(given)) - free)
    return [
        f"`{key}` ({previous.get(key)!r} there, {now.get(key)!r} now)"
        for key in keys
        if previous.get(key) != now.get(key)
    ]


def recipe_in(run_dir: Path) -> dict[str, Any]:
    """The resolved recipe of a run, by field; nothing if it has none."""
    file = run_dir / RECIPE_FILE
    return (yaml.load(file.read_text(encoding="utf-8"), Loader=RecipeLoader) if file.is_file() else None) or {}


def _checkpoint(args: TrainingArguments, recipe: Recipe) -> str | None:
    if not wants_resume(args):
        return None
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    wanted = True if wanted in ("true", "True") else wanted
    if wanted is True and not checkpoints(folder) and (folder / RECIPE_FILE).is_file():
        print(f"{folder} holds no checkpoint of this run yet: starting at the first step", file=sys.stderr)
        return None
    checkpoint = checkpoint_to_resume(folder, wanted, recipe.values.get("on_damaged_checkpoint", "error"))
    check_processes(checkpoint, args, recipe_in(checkpoint.parent))
    return str(checkpoint)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise OutputDirError(
            f"cannot write into `output_dir` {folder}: {error.strerror}. Choose another `output_dir`."
        ) from error


def _check_owner(folder: Path, recipe: Recipe, resuming: bool) -> None:
    try:
        content = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise OutputDirError(f"cannot read `output_dir` {folder}: {error.strerror}.") from error
    if not content:
        return
    untouched = "Nothing in it was touched."
    if RECIPE_FILE not in content:
        raise OutputDirError(
            f"`output_dir` {folder} is not empty and no run of trl_llava (it has no {RECIPE_FILE}): choose another "
            f"`output_dir`. {untouched}"
        )
    if changes := differences(recipe_in(folder), recipe.values, recipe.given):
        raise OutputDirError(
            f"`output_dir` {folder} holds another run; its {RECIPE_FILE} differs in {'; '.join(changes[:5])}"
            f"{f' and {len(changes) - 5} more' if len(changes) > 5 else ''}. Choose another `output_dir`"
            f"{' (`resume_from_checkpoint` may name a checkpoint in the old one)' if resuming else ''}. {untouched}"
        )
    if FINISHED_FILE in content and not checkpoints(folder):
        raise OutputDirError(
            f"`output_dir` {folder} holds this run, finished, and no checkpoint-*: choose another `output_dir`, or "
            f"remove this one yourself. {untouched}"
        )
    # A recipe alone is of a run that was killed before its first step.
    if not resuming and any(name not in (RECIPE_FILE, VERSIONS_FILE) and not is_leftover(name) for name in content):
        raise OutputDirError(
            f"`output_dir` {folder} already holds this run: resume it with `resume_from_checkpoint: true` (from its "
            "last checkpoint, or from the first step if there is none yet), or choose another `output_dir`. "
            f"{untouched}"
        )
