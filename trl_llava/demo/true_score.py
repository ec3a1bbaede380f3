"""The score that a reward model can only estimate: how true an answer about the drawn world is."""

from typing import Any

from trl_llava.demo.language import mentioned
from trl_llava.demo.metrics import Answered, is_right


def true_score(
    completions: list[list[dict[str, Any]]],
    kind: list[str],
    answer_type: list[str],
    objects: list[list[str]],
    **columns: Any,
) -> list[float]:
    """A reward function with TRL's signature, of B completions.

    For a description, found minus invented and repeated objects, as a share of those present; else 1 or -1.
    """
    scores = []
    for completion, question, right, present in zip(completions, kind, answer_type, objects, strict=True):
        text = completion[0]["content"]
        if question == "describe":
            names = mentioned(text)
            found = len(set(names) & set(present))
            repeated = len(names) - len(set(names))
            false = len(set(names) - set(present))
            scores.append((found - false - repeated) / len(present))
        else:
            scores.append(1.0 if is_right(Answered(question, right, tuple(present), text, 0)) else -1.0)
    return scores
