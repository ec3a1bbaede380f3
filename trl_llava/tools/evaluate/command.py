"""`trl-llava eval`: how much models invent and how right they are, with intervals, on the same questions.

    trl-llava eval --model runs/sft --model runs/ppo --tasks own.jsonl --output_dir runs/evaluation

The first model is what the others are compared with. Written are evaluation.json (the numbers), evaluation.html
(images, questions and answers side by side) and answers/TASK.jsonl. docs/evaluation.md describes tasks and data.
"""

import argparse
import gc
import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from trl_llava.data.contract import check_captions
from trl_llava.errors import MissingPackageError, RecipeError
from trl_llava.hub.lookup import check_there
from trl_llava.hub.names import split_revision
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.rewards.reward_settings import read_settings
from trl_llava.tools.evaluate.files import ANSWERS, labels, short_names
from trl_llava.tools.evaluate.judge import KEYS, Judge
from trl_llava.tools.evaluate.mmhal import MMHalTask
from trl_llava.tools.evaluate.model import Row, check_answers, check_has_model
from trl_llava.tools.evaluate.options import (
    add_data,
    add_decoding,
    add_loading,
    decoding_of,
    interruptible,
    limited,
    load_model,
    parse,
    positive,
    read_rows,
)
from trl_llava.tools.evaluate.output import add_output, check_output, write_results
from trl_llava.tools.evaluate.own_data import OwnTask, is_own_data
from trl_llava.tools.evaluate.results import Task

BENCHMARKS = ("pope", "chair", "amber_g", "mmvp", "hallusion_bench")
"""What lmms-eval runs; its module is not imported to find out."""


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-llava eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, help="Hub ID or folder; may be given many times")
    parser.add_argument(
        "--tasks", required=True, help=f"mmhal, {', '.join(BENCHMARKS)}, or files of rows, separated by commas"
    )
    parser.add_argument("--reward_model", help="factual reward model that scores the answers to own questions")
    parser.add_argument("--vocabulary", help="JSON file with names of objects: a list, or {name: [other words]}")
    parser.add_argument("--data", help="folder with a copy of each benchmark's data, by the task's name")
    parser.add_argument(
        "--plain_questions", action="store_true", help="ask benchmarks without what lmms-eval adds to a question"
    )
    group = parser.add_argument_group("judge (mmhal)")
    group.add_argument("--judge_base_url", help="OpenAI-compatible address, as http://localhost:8000/v1")
    group.add_argument("--judge_model", help=f"the judge's name there; its key is read from {' or '.join(KEYS)}")
    group.add_argument("--judge_concurrency", type=positive, default=8, help="requests at once (default: 8)")
    group.add_argument("--judge_options", default='{"temperature": 0}', help="further fields of a request, as JSON")
    add_output(parser, "runs/evaluation")
    add_data(parser)
    add_decoding(parser)
    add_loading(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Evaluates all models on all tasks, prints the table and writes the files."""
    args = parse(make_parser(), argv)
    check_output(args, args.model)
    _check_models(args.model)
    models = dict(zip(labels(args.model), args.model, strict=True))
    with interruptible("no result is written. The command asks all questions again; what a judge has said is kept"):
        tasks = make_tasks(args)
        answers: list[list[Any]] = [[] for _ in tasks]
        for name in args.model:
            model = load_model(args, name)
            for own, task in zip(answers, tasks, strict=True):
                own.append(task.ask(model, decoding_of(args)))
            del model
            free_memory()
        results = [task.judge(list(models), own) for task, own in zip(tasks, answers, strict=True)]
    write_results(args, results, models, _about(args))
    return 0


def make_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks in the order given; whatever of them is not there is an error before a model is loaded."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"--tasks: expected different names, separated by commas; found {args.tasks!r}.")
    known = (MMHalTask.name, *BENCHMARKS)
    unknown = [name for name in names if name not in known and not is_own_data(name)]
    if unknown:
        raise RecipeError(
            f"--tasks: there is no task {unknown[0]!r}; expected {', '.join(known)}, or the file of a data set of "
            "your own."
        )
    makers = {MMHalTask.name: _mmhal, **dict.fromkeys(BENCHMARKS, _benchmark)}
    tasks = [makers.get(name, _own)(args, name) for name in names]
    for task, name in zip(tasks, short_names(names), strict=True):
        task.name = name
    return tasks


def _benchmark(args: argparse.Namespace, name: str) -> Task:
    if importlib.util.find_spec("lmms_eval") is None:
        raise MissingPackageError(
            f'{name} needs lmms-eval, which is not installed: `pip install -e ".[eval]"` in a checkout, into an '
            "environment of its own (docs/evaluation.md)."
        )
    from trl_llava.tools.evaluate.benchmarks import LmmsTask

    return LmmsTask(
        name, None if args.data is None else Path(args.data) / name, args.limit, plain=args.plain_questions
    )


def _own(args: argparse.Namespace, name: str) -> Task:
    everything = read_rows(args, name)
    rows = limited(everything, args.limit)
    reward = None
    if args.reward_model is not None:
        _check_reward(args.reward_model, rows)
        reward = (labels([args.reward_model])[0], partial(_reward, args.reward_model, args.batch_size))
    return OwnTask(name, rows, everything, args.vocabulary, reward)


def _mmhal(args: argparse.Namespace, name: str) -> Task:
    if args.judge_base_url is None or args.judge_model is None:
        raise RecipeError("mmhal needs a judge: name it with --judge_base_url and --judge_model.")
    try:
        options = json.loads(args.judge_options)
    except ValueError as error:
        raise RecipeError(f"--judge_options: {args.judge_options!r} is not JSON ({error}).") from error
    if not isinstance(options, dict):
        raise RecipeError(f"--judge_options: expected a JSON object, found {args.judge_options!r}.")
    verdicts = Path(args.output_dir) / ANSWERS / "mmhal_verdicts.jsonl"
    judge = Judge(args.judge_base_url, args.judge_model, verdicts, options, args.judge_concurrency)
    task = MMHalTask(judge, None if args.data is None else Path(args.data) / MMHalTask.name, args.limit)
    judge.check()
    return task


@cache
def _reward(name: str, batch_size: int) -> FactualReward:
    return FactualReward.from_pretrained(name, batch_size=batch_size)


def free_memory() -> None:
    """Give back what a model took, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_models(names: list[str]) -> None:
    """Find every model before the first one is loaded, and asked for an hour."""
    if len(set(names)) < len(names):
        raise RecipeError("--model: a model is named twice.")
    for name in names:
        path, revision = split_revision("--model", name)
        check_there("--model", path, revision)
        check_has_model(path)
        check_answers(path, revision)


def _check_reward(name: str, rows: Iterable[Row]) -> None:
    """Refuse a reward model that is none, or that reads captions where rows have none."""
    path, revision = split_revision("--reward_model", name)
    prompt = read_settings(check_there("--reward_model", path, revision), revision=revision).judging_prompt
    for row in rows if prompt is not None and prompt.with_captions else ():
        check_captions(row["captions"], row["row_name"])


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "decoding": "greedy" if args.temperature == 0 else f"temperature {args.temperature}, seed {args.seed}",
        "at most": f"{args.max_new_tokens} tokens",
        "reward model": args.reward_model,
        "judge": args.judge_model,
        "command": " ".join(["trl-llava eval", *sys.argv[2:]]) if sys.argv[1:2] == ["eval"] else "",
    }
