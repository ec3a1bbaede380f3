"""`trl-llava score`: the score of one completion, or of every row of a data set, by a reward model.

    trl-llava score --reward_model runs/reward --image dog.jpg --question "What is it?" --answer "A dog."
    trl-llava score --reward_model runs/reward --data completions.jsonl --output scores.jsonl

Rows have `prompt` and `completion`, or `chosen` and `rejected`, as docs/data.md says, and captions where the model
reads them. Each line of the output has the row's name and its score, or both.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trl_llava.data.contract import check_captions
from trl_llava.data.sources import json_columns, read_source
from trl_llava.errors import RecipeError
from trl_llava.run.atomic_files import write_atomically
from trl_llava.tools.evaluate.model import Row, question_row
from trl_llava.tools.evaluate.options import add_data, add_loading, check_free, open_image, parse, positive, read_rows
from trl_llava.tools.evaluate.scorers import Scorer, load_scorer, loading_config


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-llava score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reward_model", required=True, help="FactualReward checkpoint: Hub ID or folder")
    one = parser.add_argument_group("one completion")
    one.add_argument("--image", help="image file")
    one.add_argument("--question")
    one.add_argument("--answer")
    one.add_argument("--caption", action="append", default=[], help="of the image; may be given many times")
    many = parser.add_argument_group("many")
    many.add_argument("--data", help="Hub ID, file or folder (docs/data.md)")
    many.add_argument("--output", help="file to write (default: standard output)")
    many.add_argument("--batch_size", type=positive, default=16, help="completions in one pass (default: 16)")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint")
    add_data(parser)
    add_loading(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Prints one number, or writes a line for each row."""
    args = parse(make_parser(), argv)
    check_free(args.output)
    alone = [name for name in ("image", "question", "answer") if getattr(args, name) is not None]
    if (args.data is None) != (len(alone) == 3) or (args.data and (alone or args.caption)):
        raise RecipeError("score takes --image, --question and --answer for one completion, or --data for many.")
    rows, columns = ([_row(args)], ["completion"]) if args.data is None else _read(args)
    name = args.reward_model if args.revision is None else f"{args.reward_model}@{args.revision}"
    scorer = load_scorer(name, loading_config(args), args.batch_size, args.base)
    if args.data is None:
        if scorer.reward.needs_captions and not args.caption:
            raise RecipeError(f'the reward model {name} reads captions: give at least one --caption "...".')
        print(f"{scorer.scores(rows, 'completion')[0]:.4f}")
        return 0
    lines = _scored(scorer, rows, columns)
    if args.output is None:
        sys.stdout.write(lines)
    else:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(args.output), lines)
    return 0


def _row(args: argparse.Namespace) -> Row:
    return {
        **question_row("the completion", args.question, [open_image(args.image)]),
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": args.answer}]}],
        "captions": args.caption or None,
    }


def _read(args: argparse.Namespace) -> tuple[Sequence[Row], list[str]]:
    """The rows of a data set, and which columns of them are scored."""
    raw = read_source(args.data, split=args.split)
    pairs = "completion" not in (json_columns(raw) if raw.is_json else raw.dataset.features)
    if pairs:
        found: Sequence[Row] = read_rows(args, raw, "preference")
    else:
        # Captions belong to the prompt stage's rows, completions to SFT's.
        told, known = read_rows(args, raw, "sft", captions_file=None), read_rows(args, raw)
        found = [{**row, "captions": own["captions"]} for row, own in zip(told, known, strict=True)]
    limit = len(found) if args.limit is None else min(args.limit, len(found))
    return [found[place] for place in range(limit)], ["chosen", "rejected"] if pairs else ["completion"]


def _scored(scorer: Scorer, rows: Sequence[Row], columns: list[str]) -> str:
    for row in rows if scorer.reward.needs_captions else ():
        check_captions(row["captions"], row["row_name"])
    scores = {column: scorer.scores(rows, column) for column in columns}
    keys = {column: "score" if column == "completion" else f"score_{column}" for column in columns}
    lines = []
    for place, row in enumerate(rows):
        record = {"row_name": row["row_name"], **{keys[column]: scores[column][place] for column in columns}}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)
