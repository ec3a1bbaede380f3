"""The tables of `benchmarks.gpu`: steps and what share of the card they use, decoding, sides in turn, OneVision."""

import statistics
from typing import Any, NamedTuple

from benchmarks import ppo_sides, sft_step
from benchmarks.gpu_work import Card, decoding_bytes, pass_flops, training_flops
from benchmarks.tables import markdown, median_of
from benchmarks.workload import Size


class Case(NamedTuple):
    """One measurement; `batch` are the rows (pairs of the reward model) that a pass takes at once."""

    kind: str  # step, decoding, lengths, beside or onevision
    stage: str  # sft, reward or ppo
    base: str  # bf16 or nf4
    batch: int

    @property
    def name(self) -> str:
        """Its fields in words."""
        return " ".join(map(str, self))


def ppo_of(case: Case, size: Size, steps: int, response_length: int) -> ppo_sides.Step:
    """The PPO step of a case: completions of four lengths up to the limit, or, to measure decoding, all of it."""
    least = 4 if case.kind == "decoding" else 1
    lengths = tuple(response_length * max(4 - row % 4, least) // 4 for row in range(case.batch))
    return ppo_sides.Step(size, lengths, response_length, micro_batch=case.batch, epochs=1, steps=steps)


def step_row(case: Case, size: Size, runs: list[dict[str, Any]], card: Card, response_length: int) -> dict[str, Any]:
    """A row of the table of steps.

    Lengths are those of the workload's middle: prompts have about 40 tokens of template, the judging turn with
    captions about 200. What is computed once is counted once: a pair's prompt, for both completions. The share of
    bandwidth is too low by the time of the prompts' own pass, and where memory makes generation take a batch in parts,
    each of which reads the weights.
    """
    seconds = statistics.median(run["seconds"] for run in runs)
    prompt = size.image_tokens + size.question + 40
    bandwidth = None
    if case.stage == "ppo":
        answers = ppo_of(case, size, 1, response_length).lengths
        rows = [prompt + answer for answer in answers]
        # Prompts once and tokens one by one in generation; policy, reference, value and reward; two trained.
        generated = pass_flops(size, rows, sum(answers), 0)
        asked = 2 * pass_flops(size, rows, sum(answers), 0) + 2 * pass_flops(size, rows, 0, 0)
        trained = training_flops(size, rows, sum(answers), 0) + training_flops(size, rows, 0, 0)
        flops = generated + asked + trained + pass_flops(size, [], 0, case.batch)
        generation = statistics.median(run["phases"]["generation"] for run in runs)
        moved = decoding_bytes(size, case.base, [prompt] * case.batch, answers)
        bandwidth = moved / generation / (card.gbs * 1e9)
        tokens = sum(rows)
    else:
        answer = sum(sft_step.Step.answer) / 2
        behind = 2 * (answer + 200) if case.stage == "reward" else answer
        rows = [round(prompt + behind)] * case.batch
        predicted = 0 if case.stage == "reward" else sum(rows)
        flops = training_flops(size, rows, predicted, case.batch)
        tokens = sum(rows)
    return {
        **_named(case),
        "s per step": seconds,
        "tokens/s": tokens / seconds,
        "of bf16 peak": flops / seconds / (card.tflops * 1e12),
        "of bandwidth, generation": bandwidth,
        "peak GiB": peak_gib(runs),
        "planned GiB": runs[0].get("planned_gib"),
    }


def decoding_row(
    case: Case, size: Size, runs: list[dict[str, Any]], card: Card, response_length: int
) -> dict[str, Any]:
    """A row of the table of decoding; the prompts' own pass is in both times."""
    theirs = statistics.median(run["phases"]["transformers"] for run in runs)
    ours = statistics.median(run["phases"]["generation"] - run["phases"]["transformers"] for run in runs)
    prompts = [size.image_tokens + size.question + 40] * case.batch
    moved = decoding_bytes(size, case.base, prompts, [response_length] * case.batch)
    return {
        **_named(case),
        "ms a token": 1000 * ours / response_length,
        "transformers' ms": 1000 * theirs / response_length,
        "of transformers'": ours / theirs,
        "of bandwidth": moved / ours / (card.gbs * 1e9),
    }


def lengths_row(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table of lengths: seconds of each side, and what new lengths cost; ratios within pairs of steps."""
    known, new = ([run for run in runs if run["lengths"] == lengths] for lengths in ("known", "new"))
    other = other_side(runs)
    return {
        **_named(case),
        "ours, known": median_of(known, "ours", "seconds"),
        "ours, new": median_of(new, "ours", "seconds"),
        "new to known": _in_turn((new, "ours"), (known, "ours")),
        "beside": other,
        "its new to known": _in_turn((new, other), (known, other)),
        "ours to it, known": _in_turn((known, "ours"), (known, other)),
        "ours to it, new": _in_turn((new, "ours"), (new, other)),
    }


def beside_row(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table of PPO beside TRL's: seconds of a step and of its generation, memory, ratio in turn."""
    other = other_side(runs)
    row: dict[str, Any] = {**_named(case), "beside": other}
    for name, side in (("our", "ours"), ("its", other)):
        row[f"{name} s per step"] = median_of(runs, side, "seconds")
        row[f"{name} s of generation"] = median_of(runs, side, "phases", "generation")
        row[f"{name} peak GiB"] = peak_gib([run for run in runs if run["side"] == side])
    return {**row, "ours to it": _in_turn((runs, "ours"), (runs, other))}


def other_side(runs: list[dict[str, Any]]) -> str:
    """Who ours are compared with."""
    return str(next(run["side"] for run in runs if run["side"] != "ours"))


def _in_turn(of: tuple[list[dict[str, Any]], str], to: tuple[list[dict[str, Any]], str]) -> float:
    """The median of the ratios of two sides' seconds, each of steps that were taken one after the other."""
    over, under = ({run["run"]: run["seconds"] for run in runs if run["side"] == side} for runs, side in (of, to))
    return statistics.median(over[number] / under[number] for number in over)


def onevision_row(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table of OneVision's recipes within 24 GB."""
    reserved = max(run.get("gpu_mib", 0.0) for run in runs) / 1024
    seconds = statistics.median(run["seconds"] for run in runs)
    return {**_named(case), "s per step": seconds, "peak GiB": peak_gib(runs), "reserved GiB": reserved}


def peak_gib(runs: list[dict[str, Any]]) -> float:
    """The most that tensors took, of the GPU if there is one."""
    return max(run["peak_mib"] for run in runs) / 1024


def _named(case: Case) -> dict[str, Any]:
    return {"stage": case.stage, "base": case.base, "batch": case.batch}


def tables(
    entries: list[dict[str, Any]], size: Size, card: Card, response_length: int
) -> tuple[str, dict[str, float | None]]:
    """A Markdown table for each kind of case, and `NAME COLUMN` -> number of all that is a share or a ratio."""
    cases: dict[Case, list[dict[str, Any]]] = {}
    for entry in entries:
        cases.setdefault(Case._make(entry[field] for field in Case._fields), []).append(entry)
    rows: dict[str, list[dict[str, Any]]] = {}
    ratios: dict[str, float | None] = {}
    for case, runs in cases.items():
        if runs[0]["seconds"] is None:
            rows.setdefault("not measured", []).append({"case": case.name, "why": runs[0]["run"]})
            continue
        if case.kind in ("step", "decoding"):
            make = step_row if case.kind == "step" else decoding_row
            row = make(case, size, runs, card, response_length)
        else:
            row = {"lengths": lengths_row, "beside": beside_row, "onevision": onevision_row}[case.kind](case, runs)
        rows.setdefault(case.kind, []).append(row)
        ratios |= {f"{case.name} {key}": row[key] for key in row if key.startswith("of ") or " to " in key}
    return "\n\n".join(f"{kind}:\n\n{markdown(own)}" for kind, own in rows.items()) + "\n", ratios
