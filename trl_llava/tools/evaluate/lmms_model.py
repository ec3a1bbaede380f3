"""Our model as lmms-eval wants one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from trl_llava.errors import InputError
from trl_llava.tools.evaluate.model import Decoding, EvaluationModel, Generated, Row, question_row


class Asked(NamedTuple):
    """A model's answer to a question of lmms-eval."""

    text: str
    generated: Generated


class LmmsModel(lmms):
    """Every request is answered, or the run ends.

    A task's own length and its stop strings count, not those of the command line; completions are greedy.
    """

    def __init__(self, model: EvaluationModel, decoding: Decoding, name: str) -> None:
        super().__init__()
        self.model = model
        self.decoding = decoding
        self.name = name
        self.answers: dict[int, Asked] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer all requests, in batches."""
        settings = requests[0].args[1]
        decoding = replace(self.decoding, max_new_tokens=settings.get("max_new_tokens", 128), temperature=0.0)
        completions = self.model.complete(self._rows(requests), decoding)
        bar = tqdm(completions, desc=f"{self.model.name}: {self.name}", total=len(requests), disable=None)
        for request, generated in zip(requests, bar, strict=True):
            self.answers[request.args[3]] = Asked(_cut(generated.text, settings.get("until")), generated)
        return [self.answers[request.args[3]].text for request in requests]

    def _rows(self, requests: list[Instance]) -> Iterator[Row]:
        for request in requests:
            text, _, doc_to_visual, place, task, split = request.args
            yield row_of(text, doc_to_visual(self.task_dict[task][split][place]), f"{self.name}[{place}]")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """No benchmark here asks for it."""
        raise InputError(f"{self.name} asks for likelihoods, which `trl-llava eval` does not give")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """No benchmark here asks for it."""
        raise InputError(f"{self.name} asks in several rounds, which `trl-llava eval` does not do")


def row_of(text: str, images: Sequence[Any], name: str) -> Row:
    """A row of the prompt stage that asks about images."""
    if not all(isinstance(image, Image.Image) for image in images):
        raise InputError(f"{name}: it shows something else than images")
    return question_row(name, text, images)


def _cut(text: str, until: Any) -> str:
    """The text before the first of the strings that end an answer."""
    ends = [until] if isinstance(until, str) else until or []
    return min((text.partition(end)[0].strip() for end in ends if end), key=len, default=text)
