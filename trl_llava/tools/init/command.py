"""`trl-llava init`: looks at a folder of one's own images and rows, and writes recipes that run as they are.

    trl-llava init FOLDER [--base ID] [--gpu-memory GIB]

Out: `FOLDER/recipes/` with sft.yaml, reward.yaml and ppo.yaml, as far as the rows allow. Runs go to `FOLDER/runs/`.
"""

import argparse
import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from trl_llava.errors import InputError, OccupiedError
from trl_llava.hub.names import split_revision
from trl_llava.run.atomic_files import write_atomically
from trl_llava.tools.init.found_files import LOOKED_AT, Found, RowFile, look_into
from trl_llava.tools.init.recipes import STAGES, Plan, Recipe, Values, choose_rows, write_values
from trl_llava.tools.init.sizes import fit, measure, model_values, response_length

BASE = "llava-hf/llava-1.5-7b-hf"
READ_AS = {"sft": "completions (sft)", "preference": "preferences (reward, dpo)", "prompt": "prompts (ppo)"}


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-llava init", description="Writes recipes for a folder of images and .json, .jsonl or .parquet files."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="images and rows, also in folders below it")
    parser.add_argument("--base", default=BASE, help=f"the model to train: Hub ID or folder (default: {BASE})")
    parser.add_argument(
        "--gpu-memory", "--gpu_memory", type=float, help="GiB of the GPU that it is for (default: the one seen here)"
    )
    parser.add_argument("--reward_model", help="for PPO, where the folder has no preferences: Hub ID or folder")
    parser.add_argument("--recipes", type=Path, help="where they go (default: FOLDER/recipes)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Prints what was found and what was written, and the commands to run."""
    options = make_parser().parse_args(argv)
    _check_memory(options.gpu_memory)
    target = options.recipes or options.folder / "recipes"
    for stage in STAGES:
        if (target / f"{stage}.yaml").exists():
            raise OccupiedError(
                f"{target / f'{stage}.yaml'} is there already, and nothing was written: move it away, or name another "
                "folder with --recipes."
            )
    found = look_into(options.folder)
    chosen = choose_rows(found)
    if "reward" not in chosen and options.reward_model is None:
        chosen.pop("ppo", None)
    _print_found(found, chosen)
    memory, hardware = _hardware(options.gpu_memory)
    values, processor, problem = model_values(options.base, memory is None)
    split_revision("--base", options.base)
    plan = Plan(found, target, options.folder / "runs", values, memory is None, options.reward_model)
    recipes = write_values(plan, chosen)
    said = [hardware]
    if problem is not None:
        said.append(f"rows are not measured and micro-batches are of one row, as the base cannot be read: {problem}")
    else:
        if "ppo" in recipes and chosen.get("sft"):
            recipes["ppo"].set(response_length=response_length(processor, chosen["sft"].completions))
        said += _drafted(recipes, values, memory)
    for recipe in recipes.values():
        recipe.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(recipe.path, recipe.text())
    _print_written(recipes, chosen, said)
    return 0


def _check_memory(memory: float | None) -> None:
    if memory is not None and not 1 < memory < float("inf"):
        raise InputError(f"--gpu-memory must be above 1 (GiB), found {memory:g}.")


def _hardware(given: float | None) -> tuple[float | None, str]:
    """GiB of the GPU that the recipes are for, None for a CPU, and what to say about it."""
    if given is not None:
        return given, f"for a GPU of {given:g} GiB"
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return memory, f"for the GPU here, of {memory:.1f} GiB"
    return (
        None,
        "no GPU is seen here: the recipes say `use_cpu: true`; --gpu-memory 24 writes them for a card of 24 GiB",
    )


def _drafted(recipes: Mapping[str, Recipe], values: Values, memory: float | None) -> list[str]:
    """Measures and plans with the recipes in a folder of their own, as each may read the others."""
    said: list[str] = []
    captions = "reward" in recipes and bool(recipes["reward"].values["with_captions"])
    places = {recipe.stage: recipe.path for recipe in recipes.values()}
    with TemporaryDirectory() as folder:

        def draft() -> None:
            for recipe in recipes.values():
                recipe.path = Path(folder, f"{recipe.stage}.yaml")
                recipe.path.write_text(recipe.text(), encoding="utf-8")

        draft()
        for recipe in recipes.values():
            said += measure(recipe, values, require_captions=captions and recipe.stage == "ppo")
        if memory is not None:
            draft()
            said += fit(recipes, memory)
    for recipe in recipes.values():
        recipe.path = places[recipe.stage]
    return said


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + "s" * (number != 1)


def _print_found(found: Found, chosen: Mapping[str, RowFile]) -> None:
    print(f"{found.folder}: {_count(len(found.images), 'image')}, {_count(len(found.files), 'file')} of rows")
    used = {file.name: [stage for stage, other in chosen.items() if other is file] for file in found.files}
    for file in found.files:
        reads = ", ".join(text for stage, text in READ_AS.items() if stage in file.usable)
        captions = {"own": "; with captions", "joined": "; captions from the file", None: ""}[file.captions]
        images = f"; images of {file.image_folder.relative_to(found.folder)}" if file.image_folder is not None else ""
        into = ", ".join(used[file.name]) or "not used"
        print(f"  {file.name}: {_count(file.rows, 'row')}: {reads}{captions}{images} -> {into}")
        looked_at = min(file.rows, LOOKED_AT)
        problems: dict[str, list[str]] = {}
        for stage, usable in file.usable.items():
            if usable < looked_at and used[file.name]:
                said = f"{looked_at - usable} of the first {looked_at} rows are no %s: {file.problems[stage]}"
                problems.setdefault(said, []).append(READ_AS[stage])
        for said, names in problems.items():
            print(f"    {said % ', '.join(names)}")
    if found.captions_file is not None:
        print(
            f"  {found.captions_file.relative_to(found.folder)}: captions of {_count(found.captioned_images, 'image')}"
        )
    for reason in found.left_out:
        print(f"  not used: {reason}")


def _print_written(recipes: Mapping[str, Recipe], chosen: Mapping[str, RowFile], said: Sequence[str]) -> None:
    for line in dict.fromkeys(said):
        print(f"- {line}")
    if "sft" not in chosen:
        print("- no completions, so no sft.yaml: PPO starts from the base itself")
    if "reward" not in chosen:
        instead = "" if "ppo" in recipes else "; PPO needs another reward model (--reward_model), so no ppo.yaml"
        print(f"- no preferences, so no reward.yaml, and DPO is not possible{instead}")
    elif not recipes["reward"].values["with_captions"]:
        print("- not all rows have captions: the reward model reads none (`with_captions: false`)")
    for recipe in recipes.values():
        values = recipe.values
        step = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
        print(f"wrote {recipe.path}: {_count(recipe.steps, 'step')} of {_count(step, 'row')}")
    four_bit = any(recipe.values.get("load_in_4bit") for recipe in recipes.values())
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        print("4 bits need bitsandbytes: pip install 'trl-llava[qlora]'")
    one = " --num_processes 1" if torch.cuda.device_count() > 1 else ""
    print("\nRun, in this directory:")
    for recipe in recipes.values():
        print(f"  trl-llava {recipe.stage} --config {shlex.quote(str(recipe.path))}{one}")
