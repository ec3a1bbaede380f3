"""Data sets as they lie on the Hub, record by record to TRL's columns: one reader for each layout.

A reader gives `images`, `prompt`, and either `chosen` and `rejected` or `RATED`: completions, each with its ratings by
name. What has TRL's columns already, be it texts or messages (trl-lib/rlaif-v, MM-RLHF's pairs), needs no reader.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from trl_llava.data.contract import RowError, abridged

Record = dict[str, Any]

RATED = "_rated"
"""Column in which a reader leaves completions for `best_and_worst`: reading a prompt needs no rating."""

USUAL_RATINGS = ("Visual Faithfulness", "final_ranking")
"""Which rating orders completions unless the caller names one: VLFeedback's, MM-RLHF's."""


class Layout(NamedTuple):
    """Columns that tell a layout where none of `unless` is there, its reader, and `others` that it reads too."""

    columns: frozenset[str]
    reader: Callable[[Record, str], Record]
    unless: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()


def read_layout(record: Record, row_name: str) -> Record:
    """The record in TRL's columns; one that is in them, in LLaVA's or in none that is known stays as it is."""
    layout = _layout_of({name for name, value in record.items() if value is not None})
    return record if layout is None else {**record, **layout.reader(record, row_name)}


def layout_columns(columns: Iterable[str]) -> frozenset[str]:
    """Those columns of a data set that its layout reads, beside TRL's and LLaVA's."""
    layout = _layout_of(set(columns))
    return frozenset() if layout is None else layout.columns | layout.others


def _layout_of(columns: set[str]) -> Layout | None:
    return next((it for it in LAYOUTS if it.columns <= columns and not it.unless & columns), None)


def best_and_worst(
    rated: list[tuple[str, Mapping[str, Any]]], rating: str | None, row_name: str
) -> tuple[str, str, bool]:
    """The completions that a rating puts first and last, and whether it puts them on a level.

    `rating` chooses among several ratings, None the usual one; the only one needs no choice. A completion without a
    number is not ranked.
    """
    names = sorted({name for _, ratings in rated for name in ratings})
    name = rating if rating is not None else next((usual for usual in USUAL_RATINGS if usual in names), None)
    if not names:
        raise RowError(row_name, "its completions have no ratings", "Leave the row out", "rating missing")
    if len(names) > 1 and name not in names:
        problem = f"its completions have {'the ratings' if name is None else f'no rating {name!r}, only'} {names}"
        raise RowError(row_name, problem, "Name one of them with `rating`", "rating missing")
    name = names[0] if name is None or len(names) == 1 else name
    scored = [(score, text) for text, ratings in rated if (score := _number(ratings.get(name))) is not None]
    if len(scored) < 2:
        problem = f"{len(scored)} of its {len(rated)} completions have a number as {name!r}, expected two or more"
        raise RowError(row_name, problem, "Leave the row out, or name another `rating`", "fewer than two ratings")
    best, worst = max(scored, key=_score), min(scored, key=_score)
    return best[1], worst[1], best[0] == worst[0]


def _score(scored: tuple[float, str]) -> float:
    return scored[0]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):  # no rating, or "N/A"
        return None
    return number if math.isfinite(number) else None


def _rlaif_v(record: Record, row_name: str) -> Record:
    """RLAIF-V: `image`, `question`, `chosen`, `rejected`; also a question alone, as `trl-llava eval` asks it."""
    return {"prompt": record["question"]}


def _rlhf_v(record: Record, row_name: str) -> Record:
    """RLHF-V: `image`, and `text`, which is JSON with `question`, `chosen` and `rejected`."""
    try:
        pair = json.loads(record["text"])
    except (TypeError, ValueError, RecursionError):
        pair = None
    wanted = ("question", "chosen", "rejected")
    if not isinstance(pair, dict) or not all(isinstance(pair.get(name), str) for name in wanted):
        problem = f"text is {abridged(record['text'])}, expected JSON with question, chosen and rejected"
        raise RowError(
            row_name, problem, "Correct the row, or name the columns prompt and completion", "text is no pair"
        )
    return {"prompt": pair["question"], "chosen": pair["chosen"], "rejected": pair["rejected"]}


def _vl_feedback(record: Record, row_name: str) -> Record:
    """VLFeedback: `prompt`, `img_path`, and `completions` of several models, each with its annotations by name."""
    completions = record["completions"]
    try:
        if isinstance(completions, dict):  # `datasets` stores a sequence of structs as a struct of lists
            pairs = list(zip(completions["response"], completions["annotations"], strict=True))
        else:
            pairs = [(completion["response"], completion["annotations"]) for completion in completions]
        rated = [(text, {name: given["Rating"] for name, given in notes.items()}) for text, notes in pairs]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        problem = f"completions is {abridged(completions)}, expected texts (`response`) with ratings (`annotations`)"
        raise RowError(row_name, problem, "Correct the row", "completions without ratings") from error
    shown = {} if record.get("image") or record.get("images") else {"images": record.get("img_path")}
    return {**shown, RATED: rated}


def _multimodal_reward_bench(record: Record, row_name: str) -> Record:
    """Multimodal RewardBench: `Image`, `Text`, `Output1`, `Output2`, and in `Better` the name of one of them."""
    better = record["Better"]
    if better not in ("Output1", "Output2"):
        problem = f"Better is {abridged(better)}, expected Output1 or Output2"
        raise RowError(row_name, problem, "Correct the row", "Better outside {Output1, Output2}")
    pair = {"chosen": record[better], "rejected": record["Output1" if better == "Output2" else "Output2"]}
    return {"images": record.get("Image"), "prompt": record["Text"], **pair}


def _vl_reward_bench(record: Record, row_name: str) -> Record:
    """VL-RewardBench: `image`, `query`, two texts in `response`, and their ranks in `human_ranking`, 0 the better."""
    texts, ranks = record["response"], record["human_ranking"]
    lists = isinstance(texts, list) and isinstance(ranks, list) and len(texts) == len(ranks)
    if not lists or not all(isinstance(text, str) for text in texts):
        problem = f"response is {abridged(texts)} and human_ranking {abridged(ranks)}, expected a rank for each text"
        raise RowError(row_name, problem, "Correct the row", "ranks unlike the responses")
    scores = [(text, _score_of_rank(rank)) for text, rank in zip(texts, ranks, strict=True)]
    return {"prompt": record["query"], RATED: [(text, {"human_ranking": score}) for text, score in scores]}


def _mm_rlhf(record: Record, row_name: str) -> Record:
    """MM-RLHF's data.jsonl: `image`, `question`, texts in `models_output`, and lists of their ranks and ratings.

    In `final_ranking` 1 is the best; of `faithfulness`, `helpfulness` and `ethical` more is better.
    """
    texts = record["models_output"]
    lists = {name: record[name] for name in _MM_RLHF_RATINGS if record.get(name) is not None}
    whole = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    uneven = [
        name for name, given in lists.items() if not (isinstance(given, list) and whole and len(given) == len(texts))
    ]
    if not whole or uneven:
        wrong = f"{uneven[0]} is {abridged(lists[uneven[0]])} and " if whole else ""
        problem = f"{wrong}models_output is {abridged(texts)}, expected texts with a rank and a rating for each"
        raise RowError(row_name, problem, "Correct the row", "ranks unlike the outputs")
    scores = {
        name: list(map(_score_of_rank, ranks)) if name == "final_ranking" else ranks for name, ranks in lists.items()
    }
    rated = [(text, {name: given[i] for name, given in scores.items()}) for i, text in enumerate(texts)]
    return {"prompt": record["question"], RATED: rated}


def _score_of_rank(rank: Any) -> float | None:
    """More for a better rank, which is a smaller one."""
    number = _number(rank)
    return None if number is None else -number


def _ms_swift(record: Record, row_name: str) -> Record:
    """ms-swift: `images`, `messages` that end with the chosen completion, and what was rejected.

    That is a text, `rejected_response`, or a conversation which differs in its last turn, `rejected_messages`.
    """
    messages, rejected = record["messages"], record.get("rejected_messages")
    for name, turns in (("messages", messages), ("rejected_messages", rejected)):
        if turns is not None and not (isinstance(turns, list) and turns):
            problem = f"{name} is {abridged(turns)}, expected a list that ends with the completion"
            raise RowError(row_name, problem, "Correct the row", f"{name} is no list of messages")
    if rejected is not None and record.get("rejected_response") is not None:
        problem = "it has rejected_response and rejected_messages"
        raise RowError(row_name, problem, "Keep one of them", "two rejected completions")
    if rejected is not None and rejected[:-1] != messages[:-1]:
        problem = "messages and rejected_messages differ before their last turn"
        raise RowError(row_name, problem, "Give both the same turns before it", "no common prompt")
    return {
        "messages": None,
        "prompt": messages[:-1],
        "chosen": messages[-1:],
        "rejected": record.get("rejected_response") if rejected is None else rejected[-1:],
    }


_OTHER_PROMPTS = frozenset({"prompt", "messages", "conversations"})
_MM_RLHF_RATINGS = ("final_ranking", "faithfulness", "helpfulness", "ethical")

LAYOUTS = (
    Layout(frozenset({"question", "chosen", "rejected"}), _rlaif_v, unless=_OTHER_PROMPTS),
    Layout(frozenset({"image", "text"}), _rlhf_v, unless=_OTHER_PROMPTS),
    Layout(frozenset({"prompt", "completions"}), _vl_feedback, others=frozenset({"img_path"})),
    Layout(frozenset({"Text", "Output1", "Output2", "Better"}), _multimodal_reward_bench, others=frozenset({"Image"})),
    Layout(frozenset({"query", "response", "human_ranking"}), _vl_reward_bench, unless=_OTHER_PROMPTS),
    Layout(
        frozenset({"question", "models_output"}), _mm_rlhf, unless=_OTHER_PROMPTS, others=frozenset(_MM_RLHF_RATINGS)
    ),
    Layout(frozenset({"messages", "rejected_response"}), _ms_swift, others=frozenset({"rejected_messages"})),
    Layout(frozenset({"messages", "rejected_messages"}), _ms_swift),
    Layout(frozenset({"question"}), _rlaif_v, unless=_OTHER_PROMPTS),
)
"""The first one that fits a record is taken."""
