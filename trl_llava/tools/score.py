"""`trl-llava score`: the score of one completion, by a factual reward model."""

import argparse
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging as transformers_logging

from trl_llava.configs.recipe import expand_home
from trl_llava.data.contract import RowError
from trl_llava.data.images import load_image
from trl_llava.errors import InputError, RecipeError
from trl_llava.rewards.factual_reward import FactualReward


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="trl-llava score", description=__doc__)
    parser.add_argument("--reward_model", required=True, help="FactualReward checkpoint: Hub ID or folder")
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--question", required=True)
    parser.add_argument("--answer", required=True)
    parser.add_argument("--caption", action="append", default=[], help="of the image; may be given many times")
    parser.add_argument("--base", help="the base model, if not the one that the checkpoint's adapter names")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint")
    return parser


def main(argv: Sequence[str]) -> int:
    """Prints one number."""
    args = argparse.Namespace(**expand_home(vars(make_parser().parse_args(argv))))
    transformers_logging.disable_progress_bar()
    try:
        image = load_image(args.image, "--image")
    except RowError as error:
        raise InputError(f"--image: {error.problem}.") from error  # what to do about a row is of no use here
    reward = FactualReward.from_pretrained(args.reward_model, revision=args.revision, base_model=args.base)
    if reward.needs_captions and not args.caption:
        raise RecipeError(f'the reward model {args.reward_model} reads captions: give at least one --caption "...".')
    prompt: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": args.question}]}
    ]
    completion = [{"role": "assistant", "content": args.answer}]
    scores = reward(prompts=[prompt], completions=[completion], images=[[image]], captions=[args.caption or None])
    print(f"{scores[0]:.4f}")
    return 0
