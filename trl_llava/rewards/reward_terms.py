"""The symbolic terms of a reward: correctness, length, missing stop. Pure functions with TRL's reward signature.

Each takes the columns of a batch by name, ignores those it has no use for, and returns one number per completion,
already multiplied by its coefficient: what is logged is what enters the reward. The formulae are those of "Aligning
Large Multimodal Models with Factually Augmented RLHF" (arXiv 2309.14525) and its code, except that words are matched
whole: there "Nothing" counted as "No" and "Yesterday" as "Yes".
"""

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

from trl_llava.errors import InputError

Completion = str | list[dict[str, Any]]
"""Text, or a list of one assistant message."""

CHOICES = ("A", "B", "C", "D")
KINDS = ("general", *CHOICES, "no", "yes")

_STARTS_WITH = r"{word}(?![\w'’]|-\w)"  # noqa: RUF001


def correctness(
    completions: Sequence[Completion],
    answer_type: Sequence[str] | None = None,
    *,
    coef: float = 2.0,
    yes_no: Literal["no_only", "both"] = "no_only",
    **columns: Any,
) -> list[float]:
    """Reward completions whose correctness can be read off: multiple choice, and yes/no questions.

    Multiple choice: 1 if the answer starts with its letter and a full stop ("B.") or says "correct option is B.",
    else 0. A question whose answer is no: 0.5 for "No", -0.5 for "Yes", 0 otherwise. A question whose answer is yes: 0
    as in the paper, or the mirror image with `yes_no="both"`; the one-sided bonus teaches a policy to say "No" to
    anything.

    Args:
        completions: The completions.
        answer_type: For each completion "general", "A" to "D", "no" or "yes".
        coef: What the value is multiplied by (paper: 2).
        yes_no: Whether only questions whose answer is no count, or both.
        **columns: Ignored.

    Returns:
        One number per completion.

    Raises:
        ValueError: If there is no `answer_type` column, or a value in it is unknown.

    Example:
        >>> correctness(["B. A red square", "No, there is none.", "Nothing."], ["B", "no", "no"])
        [2.0, 1.0, 0.0]
    """
    if answer_type is None:
        raise InputError(
            f"the correctness term needs a column `answer_type` with one of {', '.join(KINDS)}; add it, or switch the "
            "term off (correctness_coef: null)"
        )
    values = []
    for index, (completion, kind) in enumerate(zip(completions, answer_type, strict=True)):
        if kind not in KINDS:
            raise InputError(f"answer_type of row {index} is {kind!r}, expected one of {', '.join(KINDS)}")
        values.append(coef * _correct(_text(completion).strip(), kind, yes_no))
    return values


def length_term(
    completion_ids: Sequence[Sequence[int]],
    *,
    response_length: int,
    length_multiplier: Sequence[float | None] | None = None,
    coef: float = -10.0,
    **columns: Any,
) -> list[float]:
    """Penalise long completions: `coef * tokens / response_length * length_multiplier`.

    Args:
        completion_ids: The completions' token IDs without padding; the stop token counts.
        response_length: Most tokens of a completion.
        length_multiplier: One factor per completion, negative to reward length; missing ones are 1.
        coef: The weight (paper: -10).
        **columns: Ignored.

    Returns:
        One number per completion.

    Raises:
        ValueError: If `response_length` is not above 0.

    Example:
        >>> length_term([[5, 6, 2], [5, 2]], response_length=10, length_multiplier=[1.0, -1.0])
        [-3.0, 2.0]
    """
    if response_length <= 0:
        raise InputError(f"response_length must be above 0, found {response_length}")
    factors = [1.0] * len(completion_ids) if length_multiplier is None else length_multiplier
    return [
        coef * len(ids) / response_length * (1.0 if factor is None else factor)
        for ids, factor in zip(completion_ids, factors, strict=True)
    ]


def missing_eos(
    completion_ids: Sequence[Sequence[int]],
    *,
    eos_token_id: int | Collection[int],
    penalty: float = 8.0,
    **columns: Any,
) -> list[float]:
    """Penalise completions that never stop.

    Args:
        completion_ids: The completions' token IDs.
        eos_token_id: The stop token, or several.
        penalty: What is subtracted (paper: 8).
        **columns: Ignored.

    Returns:
        `-penalty` for each completion without a stop token, 0 for the others.

    Example:
        >>> missing_eos([[5, 6, 2], [5, 6, 7]], eos_token_id=2)
        [0.0, -8.0]
    """
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    return [0.0 if stops & set(ids) else -penalty for ids in completion_ids]


def _correct(text: str, kind: str, yes_no: str) -> float:
    """The term for one completion, before its coefficient."""
    if kind in CHOICES:
        option = rf"{kind}\.(?!\w)"
        return float(bool(re.match(option, text) or re.search(rf"\bcorrect option is {option}", text)))
    if kind == "no" or (kind == "yes" and yes_no == "both"):
        says_no = bool(re.match(_STARTS_WITH.format(word="No"), text))
        says_yes = bool(re.match(_STARTS_WITH.format(word="Yes"), text))
        value = 0.5 * (says_no - says_yes)
        return value if kind == "no" else -value
    return 0.0


def _text(completion: Completion) -> str:
    """The text of a completion."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
