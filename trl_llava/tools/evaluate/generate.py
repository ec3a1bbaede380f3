"""`trl-llava generate`: the completions of a model for rows of data, as JSON lines.

    trl-llava generate --model runs/ppo --data rows.jsonl --output completions.jsonl

Each line is the row with its `completion`, in columns that every stage and `trl-llava score` read again.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from trl_llava.data.contract import IMAGE_MARK
from trl_llava.prompts import Message, message_text
from trl_llava.tools.evaluate.model import Generated, Row
from trl_llava.tools.evaluate.options import (
    add_data,
    add_decoding,
    add_loading,
    check_free,
    decoding_of,
    interruptible,
    limited,
    load_model,
    parse,
    read_rows,
)


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-llava generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hub ID or folder: model, adapter, run or checkpoint")
    parser.add_argument("--data", required=True, help="Hub ID, file or folder (docs/data.md)")
    parser.add_argument("--output", help="file to write (default: standard output)")
    add_data(parser)
    add_decoding(parser)
    add_loading(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Writes one line for each row."""
    args = parse(make_parser(), argv)
    check_free(args.output)
    rows = limited(read_rows(args, args.data), args.limit)
    source = Path(args.data)
    folder = Path(args.image_folder or (source if source.is_dir() else source.parent))
    model = load_model(args, args.model)
    said = "not all rows are completed; the command begins again"
    if args.output is not None:
        said = f"{args.output} is not written, {args.output}.unfinished holds what there is. The command begins again"
    with interruptible(said), _written(args.output) as file:
        completions = model.complete(rows, decoding_of(args))
        for row, generated in tqdm(zip(rows, completions, strict=True), total=len(rows), disable=None):
            print(json.dumps(record(row, generated, folder), ensure_ascii=False), file=file, flush=True)
    return 0


def record(row: Row, generated: Generated, folder: Path) -> dict[str, Any]:
    """A row with its completion, its images by their names in the folder (those without a name left out)."""
    paths = [Path(image["path"]) for image in row["images"] if image["path"]]
    inside = folder.absolute()
    names = [str(path.relative_to(inside) if path.is_relative_to(inside) else path) for path in paths]
    kept = {name: value for name, value in row.items() if name not in ("images", "prompt", "row_name")}
    return {
        "row_name": row["row_name"],
        "images": names,
        "prompt": _short(row["prompt"]),
        "completion": generated.text,
        "tokens": generated.tokens,
        "finished": generated.finished,
        **{name: value for name, value in kept.items() if value not in (None, [])},
    }


def _short(prompt: list[Message]) -> str | list[Message]:
    """The text of a prompt of one turn whose images stand at its front, which the text alone says as well."""
    kinds = [part["type"] for part in prompt[0]["content"]]
    text = message_text(prompt[0])
    plain = len(prompt) == 1 and prompt[0]["role"] == "user" and kinds == sorted(kinds) and IMAGE_MARK not in text
    return text if plain else prompt


@contextmanager
def _written(output: str | None) -> Iterator[TextIO]:
    """The file to write, under another name until all is in it; or standard output."""
    if output is None:
        yield sys.stdout
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.unfinished")
    if part.exists():
        print(f"{part} is of a run that did not end; all rows are completed again", file=sys.stderr)
    with part.open("w", encoding="utf-8") as file:
        yield file
    part.replace(path)
