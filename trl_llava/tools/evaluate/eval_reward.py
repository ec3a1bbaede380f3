"""`trl-llava eval-reward`: how often reward models prefer what people prefer, and what they go by.

    trl-llava eval-reward --reward_model runs/reward --benchmark vl-rewardbench,own.jsonl

A benchmark is a data set of pairs. A model that reads captions is measured with and without them where there are any;
choosing the longer completion is the line to beat, and a reward model of another project, named with a second
--reward_model, is a baseline. Written are evaluation.json, evaluation.html and answers/BENCHMARK.jsonl.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from trl_llava.data.sources import JSON_COLUMN, RawRows, json_record, read_source
from trl_llava.errors import RecipeError
from trl_llava.prompts import message_text
from trl_llava.tools.evaluate.command import free_memory
from trl_llava.tools.evaluate.files import labels, short_names
from trl_llava.tools.evaluate.options import add_data, add_loading, limited, parse, positive, read_rows
from trl_llava.tools.evaluate.output import add_output, check_output, write_results
from trl_llava.tools.evaluate.own_data import is_own_data
from trl_llava.tools.evaluate.preferences import measures_of, statistics_of
from trl_llava.tools.evaluate.results import Outcome, Question, TaskResult
from trl_llava.tools.evaluate.scorers import Scorer, load_scorer, loading_config

LONGER = "the longer completion"
HUB_IDS = {
    "vl-rewardbench": "MMInstruction/VL-RewardBench",
    "multimodal-rewardbench": "syhuggingface/multimodal_rewardbench",
}
# VL-RewardBench's groups, by how the ids of their rows begin; whatever begins otherwise is `general`.
_GROUPS = {"rlaif": "hallucination", "rlhf": "hallucination", "hallucination": "hallucination"}
_GROUPS |= {"mathverse": "reasoning", "mmmu": "reasoning"}


class Pairs(NamedTuple):
    """A benchmark: its rows of the preference stage, and their categories if it has some."""

    name: str
    rows: Dataset
    categories: list[str] | None


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-llava eval-reward", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reward_model", action="append", required=True, help="Hub ID or folder; many times if wanted"
    )
    known = ", ".join(HUB_IDS)
    parser.add_argument("--benchmark", required=True, help=f"{known}, or files of pairs, separated by commas")
    parser.add_argument("--data", help="folder with a copy of each benchmark, by its name")
    parser.add_argument("--on_bad_row", choices=["error", "skip"], default="error", help="(default: error)")
    parser.add_argument("--batch_size", type=positive, default=16, help="completions in one pass (default: 16)")
    add_output(parser, "runs/evaluation_reward")
    add_data(parser)
    add_loading(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Scores both completions of every pair with every model, prints the table and writes the files."""
    args = parse(make_parser(), argv)
    check_output(args, args.reward_model)
    if len(set(args.reward_model)) < len(args.reward_model):
        raise RecipeError("--reward_model: a model is named twice.")
    names = [name.strip() for name in args.benchmark.split(",") if name.strip()]
    benchmarks = [
        read_pairs(args, name)._replace(name=short) for name, short in zip(names, short_names(names), strict=True)
    ]
    gaps: list[dict[str, list[tuple[float, float]]]] = [{} for _ in benchmarks]
    models = dict(zip(labels(args.reward_model), args.reward_model, strict=True))
    for label, name in models.items():
        scorer = load_scorer(name, loading_config(args), args.batch_size, args.base)
        for own, pairs in zip(gaps, benchmarks, strict=True):
            own |= score_pairs(scorer, label, pairs)
        del scorer
        free_memory()
    results = [compare(pairs, own) for pairs, own in zip(benchmarks, gaps, strict=True)]
    write_results(args, results, models, {})
    return 0


def read_pairs(args: argparse.Namespace, name: str) -> Pairs:
    """The rows of a benchmark with their categories."""
    if name not in HUB_IDS and not is_own_data(name):
        raise RecipeError(f"--benchmark: there is no {name!r}; expected {', '.join(HUB_IDS)}, or a file of pairs.")
    source, split = (HUB_IDS[name], "test") if name in HUB_IDS else (name, args.split)
    if name in HUB_IDS and args.data is not None:
        source = str(Path(args.data) / name)
    raw = read_source(source, split=split)
    rows = limited(read_rows(args, raw, "preference", on_bad_row=args.on_bad_row), args.limit)
    known = _categories(raw)
    categories = [known[row_name] for row_name in rows["row_name"]] if known else None
    return Pairs(name, rows, categories)


def score_pairs(scorer: Scorer, label: str, pairs: Pairs) -> dict[str, list[tuple[float, float]]]:
    """The scores of chosen and rejected completions, with and without captions if the model can tell."""
    reads = scorer.reward.needs_captions
    there = reads and all(pairs.rows["captions"])
    found = {}
    for captions in (True, False) if there else (False,) if reads else (True,):
        name = f"{label}, without captions" if reads and not captions else label
        sides = [scorer.scores(pairs.rows, side, captions) for side in ("chosen", "rejected")]
        found[name] = list(zip(*sides, strict=True))
    return found


def compare(pairs: Pairs, scores: dict[str, list[tuple[float, float]]]) -> TaskResult:
    """The models' measures, and those of choosing the longer completion, on one benchmark."""
    texts = [[message_text(row[side][-1]) for side in ("chosen", "rejected")] for row in pairs.rows]
    lengths = [(float(len(chosen)), float(len(rejected))) for chosen, rejected in texts]
    length_gaps = [chosen - rejected for chosen, rejected in lengths]
    outcomes, statistics = [], []
    for name, own in {**scores, LONGER: lengths}.items():
        gaps = [chosen - rejected for chosen, rejected in own]
        outcomes.append([_outcome(chosen, rejected) for chosen, rejected in own])
        statistics.append(statistics_of(gaps, length_gaps, pairs.categories, scores=name != LONGER))
    questions = [
        Question(
            row["row_name"],
            message_text(row["prompt"][-1]),
            partial(_images, pairs.rows, number),
            f"chosen: {chosen}\nrejected: {rejected}",
        )
        for number, (row, (chosen, rejected)) in enumerate(zip(pairs.rows, texts, strict=True))
    ]
    note = f"{len(questions)} pairs" + ("" if all(pairs.rows["captions"]) else ", some or all without captions")
    models = [*scores, LONGER]
    measures = measures_of(pairs.categories)
    return TaskResult(
        pairs.name, models, questions, outcomes, measures, note, statistics, without="a length is no score"
    )


def _images(rows: Dataset, number: int) -> list[Any]:
    images: list[Any] = rows[number]["images"]
    return images


def _outcome(chosen: float, rejected: float) -> Outcome:
    wrong = chosen <= rejected
    note = "" if not wrong else "a tie" if chosen == rejected else "prefers the rejected one"
    text = f"chosen {chosen:.3f}, rejected {rejected:.3f}"
    return Outcome(text, wrong, note, details={"chosen": chosen, "rejected": rejected})


def _categories(raw: RawRows) -> dict[str, str]:
    """Which category each row is of, by the row's name; empty for a data set that has none."""
    records = raw.dataset
    if raw.is_json:
        found = [(index, _parsed(text)) for index, text in zip(records["index"], records[JSON_COLUMN], strict=True)]
    else:
        columns = [
            name
            for name in ("row_name", "id", "ID", "Category", "category", "query_source")
            if name in records.features
        ]
        found = list(enumerate(records.select_columns(columns))) if columns else []
    named = {record.get("row_name") or f"{raw.name}[{index}]": category_of(record) for index, record in found}
    return {name: category for name, category in named.items() if category} if all(named.values()) else {}


def _parsed(text: str) -> dict[str, Any]:
    try:
        record = json_record(text)
    except ValueError:
        return {}  # `load_rows` has refused it, or left it out
    return record if isinstance(record, dict) else {}


def category_of(record: dict[str, Any]) -> str | None:
    """The category that a benchmark's paper counts a row in; of other data that in its column `category`.

    >>> category_of({"id": "RLAIF-V-17", "query_source": "x"}), category_of({"ID": "pairs_3", "Category": "safety"})
    ('hallucination', 'safety/bias')
    """
    if record.get("Category"):
        kind, begins = str(record["Category"]).lower(), str(record.get("ID", "")).lower()
        parts = {"safety": ("pairs", "bias", "toxicity"), "reasoning": ("math", "math", "coding")}
        if kind not in parts:
            return kind
        start, inside, outside = parts[kind]
        return f"{kind}/{inside if begins.startswith(start) else outside}"
    if record.get("category"):
        return str(record["category"])
    if record.get("id") and record.get("query_source"):
        return _GROUPS.get(str(record["id"]).replace("_", "-").split("-")[0].lower(), "general")
    return None
