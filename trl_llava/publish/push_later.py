"""`trl-llava push`: a run or checkpoint that lies in a folder, pushed after the run.

    trl-llava push runs/llava-1.5-7b-hf/reward [--hub_model_id org/name]
    trl-llava push runs/llava-1.5-7b-hf/reward/checkpoint-400

What is pushed is what the run itself would have pushed with `--push_to_hub`: of a folder of a run all checkpoints
that are later than the last one on the Hub (none with `hub_strategy: end`), each with its tag, and then, if the run
is finished, its end.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import HubStrategy

from trl_llava.configs.recipe import Recipe, RecipeLoader
from trl_llava.errors import InputError
from trl_llava.hub.lookup import UNREACHABLE
from trl_llava.publish.model_card import CardFacts, write_model_card
from trl_llava.publish.push import HubPush
from trl_llava.publish.repository import HubError, Repository, cause
from trl_llava.publish.shareable import FACTS_FILE, shareable_recipe
from trl_llava.run.checkpoint_folders import checkpoints, step_of
from trl_llava.run.manifest import check_manifest
from trl_llava.run.output_dir import FINISHED_FILE, RECIPE_FILE


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: Command line behind `trl-llava push`.

    Returns:
        Exit status.

    Raises:
        InputError: If the folder is no run, or holds nothing to push.
        HubError: If the run cannot be pushed there.
        PushError: If the Hub does not take it.
    """
    args = make_parser().parse_args(argv)
    folder = Path(args.folder).absolute()
    named = folder if step_of(folder) >= 0 else None
    run = folder.parent if named else folder
    if not (run / FACTS_FILE).is_file():
        raise InputError(f"{args.folder} is neither the folder of a run nor one of its checkpoints: no {FACTS_FILE}")
    recipe = _recipe(run)
    repository = _repository(args, run, recipe)
    strategy = HubStrategy(recipe.given.get("hub_strategy", "every_save"))
    finished = named is None and (run / FINISHED_FILE).is_file()
    found = [named] if named else _to_push(run, strategy, finished, repository)
    if not found and not finished:
        print(f"{repository.name} has the last checkpoint of {args.folder} already.")
        return 0
    for checkpoint in found:
        check_manifest(checkpoint)
    # Errors of the client's own retries are told once, by HubPush.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    push = HubPush(repository, run, strategy, keep_all=True)
    for checkpoint in found:
        _write_card(run, checkpoint, repository.name)
        push.checkpoint(checkpoint, step_of(checkpoint))
    if finished:
        _write_card(run, run, repository.name)
    url = push.end() if finished else push.finish()
    print(f"Pushed {', '.join([*(checkpoint.name for checkpoint in found), *['the end'] * finished])}: {url}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(prog="trl-llava push", description="Push a run that lies in a folder.")
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--hub_model_id", help="where to; by default as the recipe says, or the folder's name")
    parser.add_argument("--hub_revision", help="branch")
    yes_or_no: dict[str, Any] = {"nargs": "?", "const": True, "type": string_to_bool}  # as in recipes
    parser.add_argument("--hub_private_repo", **yes_or_no, help="make a new repository private")
    parser.add_argument("--hub_onto_existing", **yes_or_no, help="also onto a repository that holds another run")
    return parser


def _recipe(run: Path) -> Recipe:
    file = run / RECIPE_FILE  # a run from Python has none
    return Recipe(yaml.load(file.read_text(encoding="utf-8"), Loader=RecipeLoader) if file.is_file() else {}, {})


def _repository(args: argparse.Namespace, run: Path, recipe: Recipe) -> Repository:
    values = recipe.values
    name = args.hub_model_id or values.get("hub_model_id") or run.name
    revision = args.hub_revision or values.get("hub_revision")
    private = values.get("hub_private_repo") if args.hub_private_repo is None else args.hub_private_repo
    onto = args.hub_onto_existing or values.get("hub_onto_existing", False)
    # Without a recipe there is nothing that tells one run from another.
    repository = Repository(
        name, revision, private, shareable_recipe(recipe) if values else None, onto_existing=onto or not values
    )
    try:
        repository.verify()
    except UNREACHABLE as error:
        raise HubError(f"the Hub cannot be reached ({cause(error)}): try again later") from error
    return repository


def _to_push(run: Path, strategy: HubStrategy, finished: bool, repository: Repository) -> list[Path]:
    found = checkpoints(run)
    if not found and not finished:
        raise InputError(f"{run} holds no checkpoint-* and no finished run yet: there is nothing to push")
    if strategy is HubStrategy.END:
        return [] if finished else found[-1:]
    try:
        tags = [step_of(Path(tag.name)) for tag in repository.api().list_repo_refs(repository.name).tags]
    except UNREACHABLE as error:
        raise HubError(f"the Hub does not say what {repository.name} holds ({cause(error)})") from error
    return [checkpoint for checkpoint in found if step_of(checkpoint) > max(tags, default=-1)]


def _write_card(run: Path, of: Path, name: str) -> None:
    """The card as it was at a checkpoint, or at the end."""
    state = json.loads((of / FINISHED_FILE).read_text(encoding="utf-8"))
    write_model_card(run, CardFacts.load(run), state["log_history"], name)
