"""`trl-llava assemble`: a vision tower and a language model -> a LLaVA, whose projector is yet to be trained."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trl_llava.configs.shipped import find_shipped
from trl_llava.errors import InputError, NotFoundError
from trl_llava.hub.lookup import check_there
from trl_llava.hub.names import split_revision
from trl_llava.models.assemble import assemble_llava
from trl_llava.models.chat_templates import VICUNA_V1
from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="trl-llava assemble", description=__doc__)
    parser.add_argument("target", metavar="OUT", help="new folder")
    parser.add_argument("--tower", required=True, help="CLIP or SigLIP: Hub ID (with @revision) or folder")
    parser.add_argument("--language_model", required=True, help="causal language model: Hub ID or folder")
    parser.add_argument(
        "--chat_template",
        default=VICUNA_V1,
        help=f"{VICUNA_V1} (the default), a .jinja file, or `own`, the language model's, which must place images",
    )
    parser.add_argument("--image_token", default="<image>", help="added where it is missing (default: <image>)")
    parser.add_argument(
        "--vision_feature_layer", type=int, default=-2, help="hidden state of the tower that is used (default: -2)"
    )
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the language model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights (default: 0)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Prints what was put together, and how to train it."""
    args = make_parser().parse_args(argv)
    tower, tower_revision = split_revision("--tower", args.tower)
    language, revision = split_revision("--language_model", args.language_model)
    check_there("--tower", tower, tower_revision)
    check_there("--language_model", language, revision)
    if not args.image_token:
        raise InputError("--image_token is empty: give the text of a token")
    _, processor = assemble_llava(
        tower,
        language,
        args.target,
        image_token=args.image_token,
        vision_feature_layer=args.vision_feature_layer,
        chat_template=_template(args.chat_template),
        seed=args.seed,
        dtype=args.dtype,
        revision=revision,
        vision_revision=tower_revision,
    )
    image = processor.image_processor
    print(f"{args.target}: {args.tower} and {args.language_model}, images of {dict(image.size)} pixels")
    print("Its projector is untrained. Train it first, on rows with images and completions:")
    print(f"  trl-llava sft --model_name_or_path {args.target} --freeze_projector false --dataset_name rows.jsonl ...")
    return 0


def _template(given: str) -> str | None:
    if given == VICUNA_V1:
        return VICUNA_V1_CHAT_TEMPLATE
    if given == "own":
        return None
    path: Path = find_shipped(given)
    if not path.is_file():
        raise NotFoundError(f"--chat_template: there is no file {given}; expected one, `{VICUNA_V1}` or `own`.")
    return path.read_text(encoding="utf-8")
