"""`trl-llava chat`: talk with a model about an image, in the terminal.

    trl-llava chat --model runs/ppo --image dog.jpg

Lines beginning with / are commands: /image FILE starts anew with another image, /new starts anew, /quit ends.
Questions may also come through a pipe.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from transformers import TextStreamer

from trl_llava.errors import InputError
from trl_llava.prompts import Message
from trl_llava.tools.evaluate.model import Decoding, EvaluationModel
from trl_llava.tools.evaluate.options import add_decoding, add_loading, decoding_of, load_model, open_image, parse


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-llava chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hub ID or folder: model, adapter, run or checkpoint")
    parser.add_argument("--image", help="image file; without one the first questions are about none")
    parser.add_argument("--system", help="system message")
    add_decoding(parser)
    add_loading(parser)
    return parser


class Chat:
    """A conversation about at most one image."""

    def __init__(self, model: EvaluationModel, decoding: Decoding, system: str | None, image: str | None) -> None:
        self.model = model
        self.decoding = decoding
        self.system = system
        self.images = [] if image is None else [open_image(image)]
        self.messages: list[Message] = []
        self.turn = 0
        self.start()

    def start(self, image: str | None = None) -> None:
        """Forget what was said; with another image if one is named."""
        if image is not None:
            self.images = [open_image(image)]
        self.messages = [] if self.system is None else [_message("system", self.system)]

    def ask(self, question: str) -> None:
        """Print the answer as it comes."""
        message = _message("user", question)
        if self.images and not any(known["role"] == "user" for known in self.messages):
            message["content"].insert(0, {"type": "image", "text": None})
        row: dict[str, Any] = {
            "row_name": "the conversation",
            "images": self.images,
            "prompt": [*self.messages, message],
        }
        streamer = TextStreamer(self.model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = self.model.stream(row, self.decoding, streamer, self.turn)
        self.turn += 1
        if not answer.finished:
            print(f"(cut at --max_new_tokens {self.decoding.max_new_tokens})", file=sys.stderr)
        self.messages = [*row["prompt"], _message("assistant", answer.text)]


def main(argv: Sequence[str]) -> int:
    """Answers lines until there are no more."""
    args = parse(make_parser(), argv)
    if args.image is not None:
        open_image(args.image)  # before the model is loaded
    chat = Chat(load_model(args, args.model), decoding_of(args), args.system, args.image)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        command, _, rest = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return 0
            if command in ("/new", "/image"):
                chat.start(rest.strip() or None)
            elif command.startswith("/"):
                print("commands: /image FILE, /new, /quit", file=sys.stderr)
            elif line:
                chat.ask(line)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
