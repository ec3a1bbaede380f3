"""`trl-llava report`: one page that shows what a run did, or how several compare.

    trl-llava report runs/ppo
    trl-llava report runs/ppo_plain runs/ppo_captions --evaluation evaluation --output comparison.html

RUN is the `output_dir` of a run of any stage, also of one that still trains, or a checkpoint in it. The page is one
file that needs nothing else.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trl_llava.errors import RecipeError
from trl_llava.tools.evaluate.files import labels
from trl_llava.tools.evaluate.options import parse, positive
from trl_llava.tools.report.evaluations import read_evaluation
from trl_llava.tools.report.page import write_page
from trl_llava.tools.report.runs import read_run


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-llava report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or of a checkpoint in it")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="(default: report.html)")
    parser.add_argument("--evaluation", type=Path, help="evaluation.json of `trl-llava eval`, or its folder")
    parser.add_argument("--examples", type=positive, default=8, help="prompts on the page (default: 8)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Writes the page, and says where."""
    args = parse(make_parser(), argv)
    paths = [str(Path(run).absolute()) for run in args.runs]
    if repeated := sorted({run for run, path in zip(args.runs, paths, strict=True) if paths.count(path) > 1}):
        raise RecipeError(f"report: {repeated[0]} is given twice.")
    if args.output.suffix.lower() not in (".html", ".htm") or args.output.is_dir():
        raise RecipeError(f"report: --output: expected the name of an .html file, found {args.output}.")
    evaluation = None if args.evaluation is None else read_evaluation(args.evaluation)
    runs = [read_run(Path(run), name) for run, name in zip(args.runs, labels(paths), strict=True)]
    write_page(args.output, runs, examples=args.examples, evaluation=evaluation)
    print(f"open {args.output}")
    return 0
