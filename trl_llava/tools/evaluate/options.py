"""The options that several commands share: which model, how it is loaded, how it completes."""

import argparse
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from PIL import Image
from transformers.utils import logging as transformers_logging

from trl_llava.configs.recipe import expand_home
from trl_llava.data.contract import RowError
from trl_llava.data.images import load_image
from trl_llava.data.load import load_rows
from trl_llava.data.sources import RawRows
from trl_llava.errors import ExplainedError, InputError, OccupiedError
from trl_llava.tools.evaluate.model import Decoding, EvaluationModel


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    group = parser.add_argument_group("loading")
    group.add_argument("--base", help="base of an adapter, if not the one that it names")
    group.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as the checkpoint is stored)")
    group.add_argument("--load_in_4bit", action="store_true", help="quantise the language model (needs bitsandbytes)")
    group.add_argument("--attn_implementation", help="as for transformers")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that the repository brings along")
    group.add_argument("--chat_template_path", help="chat template instead of the one saved with the model")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """How completions are made."""
    defaults = Decoding()
    group = parser.add_argument_group("generation")
    group.add_argument("--max_new_tokens", type=positive, default=defaults.max_new_tokens, help="(default: 512)")
    group.add_argument("--temperature", type=not_negative, default=0.0, help="0, the default, is greedy")
    group.add_argument("--batch_size", type=positive, default=defaults.batch_size, help="(default: 8)")
    group.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Where the images of rows are, and how many rows are read."""
    group = parser.add_argument_group("data")
    group.add_argument("--image_folder", help="folder of the image names (default: that of the file)")
    group.add_argument("--captions_file", help="JSON file {image name: [captions]}")
    group.add_argument("--split", default="train", help="split of a Hub data set (default: train)")
    group.add_argument("--limit", type=positive, help="read so many rows only")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line, `~/` expanded, and keep the libraries' bars off the terminal."""
    args = argparse.Namespace(**expand_home(vars(parser.parse_args(argv))))
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    return args


def check_free(output: str | None) -> None:
    """A file to write that is there already, perhaps the data themselves, is an `OccupiedError`."""
    if output is not None and Path(output).exists():
        raise OccupiedError(f"{output} is there already, and stays: name another --output, or move it away.")


class Interrupted(ExplainedError):
    """Ctrl-C, said in one line."""

    exit_status = 128 + signal.SIGINT


@contextmanager
def interruptible(said: str) -> Iterator[None]:
    """Ends at Ctrl-C with a line that says what has become of the work."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped: {said}") from None


def load_model(args: argparse.Namespace, name: str) -> EvaluationModel:
    """The model of that name, loaded as the options of `add_loading` say."""
    return EvaluationModel.load(
        name,
        base=args.base,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        chat_template_path=args.chat_template_path,
    )


def decoding_of(args: argparse.Namespace) -> Decoding:
    """What the options of `add_decoding` say."""
    return Decoding(args.max_new_tokens, args.temperature, args.batch_size, args.seed)


def read_rows(args: argparse.Namespace, source: str | RawRows, stage: Any = "prompt", **changes: Any) -> Dataset:
    """Rows as the options of `add_data` say, all of them; `changes` are further options of `load_rows`."""
    said = {"split": args.split, "image_folder": args.image_folder, "captions_file": args.captions_file}
    return load_rows(source, stage, **said | changes)


def limited(rows: Dataset, limit: int | None) -> Dataset:
    """The first rows, as many as `--limit` says."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def open_image(path: str) -> Image.Image:
    """The image that a command line names."""
    try:
        return load_image(path, "image")
    except RowError as error:
        raise InputError(f"--image: {error.problem}.") from error  # what to do about a row is of no use here


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, found {text}")
    return value


def not_negative(text: str) -> float:
    """A finite number, 0 or above, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or above, found {text}")
    return value
