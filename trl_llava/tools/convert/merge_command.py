"""`trl-llava merge`: an adapter and its base as one model with dense weights."""

import argparse
from collections.abc import Sequence

from trl_llava.configs.recipe import expand_home
from trl_llava.tools.convert.merge import merge


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="trl-llava merge", description=__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub ID")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument("--base", help="the base model, if not the one that the adapter names")
    parser.add_argument("--revision", help="branch, tag or commit of ADAPTER")
    parser.add_argument("--quantized", action="store_true", help="merge into a base that is stored in 4 or 8 bits")
    parser.add_argument("--tolerance", type=float, help="largest logit difference to keep, as a share of the largest")
    return parser


def main(argv: Sequence[str]) -> int:
    """Prints how far the merged model is from base and adapter."""
    args = argparse.Namespace(**expand_home(vars(make_parser().parse_args(argv))))
    check = merge(
        args.adapter,
        args.target,
        base=args.base,
        revision=args.revision,
        quantized=args.quantized,
        tolerance=args.tolerance,
    )
    print(
        f"{args.adapter} -> {args.target} ({check.dtype}): largest logit difference {check.largest_difference:.3g} on "
        f"a probe batch; largest logit {check.largest_logit:.3g}, the adapter moves logits by up to "
        f"{check.adapter_effect:.3g}"
    )
    return 0
