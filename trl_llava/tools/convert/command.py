"""`trl-llava convert`: the paper's or LLaVA's own checkpoint as one that loads anywhere."""

import argparse
from collections.abc import Sequence

from trl_llava.tools.convert.convert_checkpoint import convert


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="trl-llava convert", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="folder, or Hub ID with the folder inside (org/name/sft_model)")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument("--base", help="for adapters: Hub ID or folder of the converted base; the adapter names it")
    parser.add_argument("--base_folder", help="where that base is now, if not yet on the Hub")
    parser.add_argument("--base_revision", help="branch, tag or commit of the base")
    parser.add_argument("--value_base", help="for PPO checkpoints: base of the value model, if it has its own")
    parser.add_argument("--vision_tower", help="for models: CLIP folder or Hub ID, if not as config.json says")
    parser.add_argument(
        "--no_captions", action="store_true", help="for reward models: trained on judging prompts without captions"
    )
    parser.add_argument("--revision", help="branch, tag or commit of SRC")
    return parser


def main(argv: Sequence[str]) -> int:
    """Prints what was converted, and where its parts came from."""
    args = vars(make_parser().parse_args(argv))
    source, target, no_captions = (args.pop(name) for name in ("source", "target", "no_captions"))
    kind, notes = convert(source, target, with_captions=not no_captions, **args)
    print("\n".join([f"{source}: {kind} -> {target}", *(f"  {note}" for note in notes)]))
    return 0
