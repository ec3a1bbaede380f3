"""`trl-llava eval`: how much models invent and how right they are, with intervals, on the same questions.

    trl-llava eval --model runs/sft --model runs/ppo --tasks own.jsonl --output_dir runs/evaluation

The first model is what the others are compared with. Written are evaluation.json (the numbers), evaluation.html
(images, questions and answers side by side) and answers/TASK.jsonl. docs/evaluation.md describes tasks and data.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trl_llava.data.contract import check_captions
from trl_llava.errors import RecipeError
from trl_llava.hub.lookup import check_there
from trl_llava.hub.names import split_revision
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.rewards.reward_settings import read_settings
from trl_llava.tools.evaluate.files import PAGE, check_output, labels, numbers, table, write_answers, write_numbers
from trl_llava.tools.evaluate.model import EvaluationModel, Generated, check_has_model
from trl_llava.tools.evaluate.options import (
    add_data,
    add_decoding,
    add_loading,
    decoding_of,
    load_model,
    parse,
    positive,
    read_rows,
)
from trl_llava.tools.evaluate.own_data import OwnTask, is_own_data
from trl_llava.tools.evaluate.page import write_page


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-llava eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, help="Hub ID or folder; may be given many times")
    parser.add_argument("--tasks", required=True, help="names of tasks and files of rows, separated by commas")
    parser.add_argument("--output_dir", default="runs/evaluation", help="(default: runs/evaluation)")
    parser.add_argument("--reward_model", help="factual reward model that scores the answers to own questions")
    parser.add_argument("--vocabulary", help="JSON file with names of objects: a list, or {name: [other words]}")
    parser.add_argument("--examples", type=positive, default=50, help="questions of a task on the page (default: 50)")
    add_data(parser)
    add_decoding(parser)
    add_loading(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Evaluates all models on all tasks, prints the table and writes the files."""
    args = parse(make_parser(), argv)
    folder = Path(args.output_dir)
    check_output(folder)
    _check_models(args.model)
    tasks = [make_task(args, name) for name in _split(args.tasks)]
    _check_reward(args, tasks)
    answers: list[list[list[Generated]]] = [[] for _ in tasks]
    for name in args.model:
        model = load_model(args, name)
        for own, task in zip(answers, tasks, strict=True):
            own.append(ask(model, task, args))
        del model
        free_memory()
    reward = None
    if args.reward_model is not None:
        reward = (args.reward_model, FactualReward.from_pretrained(args.reward_model, batch_size=args.batch_size))
    shown = labels(args.model)
    results = [task.judge(shown, own, reward) for task, own in zip(tasks, answers, strict=True)]
    found = numbers(results)
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        write_answers(folder, result)
    settings = {name: value for name, value in vars(args).items() if name not in ("model", "output_dir", "examples")}
    write_numbers(folder, found, dict(zip(shown, args.model, strict=True)), settings)
    write_page(folder / PAGE, results, found, _about(args, shown), examples=args.examples)
    print(table(found))
    print(f"open {folder / PAGE}")
    return 0


def make_task(args: argparse.Namespace, name: str) -> OwnTask:
    """The task of that name."""
    if not is_own_data(name):
        raise RecipeError(f"--tasks: there is no task {name!r}; a data set of your own is named by its file.")
    everything = read_rows(argparse.Namespace(**{**vars(args), "limit": None}), name)
    rows = everything if args.limit is None else everything.select(range(min(args.limit, len(everything))))
    return OwnTask(Path(name).name, rows, everything, args.vocabulary)


def ask(model: EvaluationModel, task: OwnTask, args: argparse.Namespace) -> list[Generated]:
    """A model's answers to all questions of a task."""
    completions = model.complete(task.rows, decoding_of(args))
    return list(tqdm(completions, desc=f"{model.name} on {task.name}", total=len(task.rows), disable=None))


def free_memory() -> None:
    """Give back what a model took, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _split(tasks: str) -> list[str]:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"--tasks: expected different names, separated by commas; found {tasks!r}.")
    return names


def _check_models(names: list[str]) -> None:
    """Find every model before the first one is loaded, and asked for an hour."""
    if len(set(names)) < len(names):
        raise RecipeError("--model: a model is named twice.")
    for name in names:
        path, revision = split_revision("--model", name)
        check_there("--model", path, revision)
        check_has_model(path)


def _check_reward(args: argparse.Namespace, tasks: list[OwnTask]) -> None:
    """Refuse a reward model that is none, or that reads captions where rows have none."""
    if args.reward_model is None:
        return
    path, revision = split_revision("--reward_model", args.reward_model)
    prompt = read_settings(check_there("--reward_model", path, revision), revision=revision).judging_prompt
    for row in (row for task in tasks for row in task.rows if prompt is not None and prompt.with_captions):
        check_captions(row["captions"], row["row_name"])


def _about(args: argparse.Namespace, shown: list[str]) -> dict[str, Any]:
    return {
        "models": ", ".join(shown),
        "decoding": "greedy" if args.temperature == 0 else f"temperature {args.temperature}, seed {args.seed}",
        "at most": f"{args.max_new_tokens} tokens",
        "reward model": args.reward_model,
        "command": " ".join(["trl-llava eval", *sys.argv[2:]]) if sys.argv[1:2] == ["eval"] else "",
    }
