"""LLaVA-1.5-7B's real shape with random weights on a GPU, the most useful measurements first, in a given time.

    python -m benchmarks.gpu [--minutes 6] [--layers 8] [--json FILE] [--runs 2] [--only decoding ...]

Five kinds of cases, each in processes of its own, whose sides take their steps in turn:

- step: a step of a stage: tokens/s, shares of the card's bfloat16 peak and of its memory bandwidth, peak memory beside
  what `trl-llava plan` says.
- decoding: milliseconds a token of our generation and of transformers' `generate` on the same prompts and policy.
- lengths: SFT in turn with TRL's trainer, and the reward model in turn with one that encodes both completions of a
  pair whole; batches of a known length in turn with ones of a length that the process has not seen.
- beside: PPO in turn with the PPO of TRL 1.12 on text as long as our prompts, where that TRL is installed.
- onevision: LLaVA-OneVision-0.5B's shape with its recipes as they are, within the memory of a 24 GB card. They read
  images in tiles, and need torchvision.

Nothing is downloaded: the weights are drawn (up to 30 GB on disk for all 32 layers, in a temporary folder that
`--folder` moves). After each case the tables so far are printed and `--json` is written anew; when the time is up, or
on SIGTERM, the running case is left out. A case that fails is a row that says so, and the command then ends with
status 1. Without a CUDA device it ends with an error.
"""

import argparse
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import trl

from benchmarks import gpu_onevision, ppo_sides, reward_step, sft_step
from benchmarks.gate import Gate
from benchmarks.gpu_tables import Case, ppo_of, tables
from benchmarks.gpu_work import find_card
from benchmarks.harness import Side, alternate, quiet, say, steps_needed
from benchmarks.rows import make_rows, stage_words
from benchmarks.tables import arguments, write_json
from benchmarks.workload import Size, make_base, make_reward, make_text_model
from trl_llava.ppo.generation import neutral_generation_config
from trl_llava.ppo_trainer import LlavaPPOTrainer
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.tools.plan import command as plan

SEVEN_B = Size(
    vocabulary=32_064, hidden=4096, layers=32, heads=32, tower_hidden=1024, tower_layers=24, question=64, rank=64
)
BASES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True},
    "nf4": {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True, "load_in_4bit": True},
}
"""Base -> keys of the recipe. TRL's default for 4 bit is NF4."""
CASES = (
    Case("step", "ppo", "bf16", 8),
    Case("decoding", "ppo", "bf16", 8),
    Case("lengths", "sft", "bf16", 8),
    Case("decoding", "ppo", "bf16", 32),
    Case("step", "ppo", "bf16", 64),
    Case("lengths", "reward", "bf16", 8),
    Case("step", "sft", "bf16", 8),
    Case("step", "reward", "bf16", 8),
    Case("step", "ppo", "nf4", 8),
    Case("beside", "ppo", "bf16", 8),
    Case("decoding", "ppo", "nf4", 8),
    Case("step", "sft", "nf4", 8),
    Case("step", "reward", "nf4", 8),
    Case("onevision", "sft", "nf4", 1),
    Case("onevision", "reward", "nf4", 1),
    Case("onevision", "ppo", "nf4", 4),
)
"""The most useful first."""
KNOWN, NEW = (243, 243), (16, 272)
"""Fewest and most words of a completion in batches of one length, and in those of which hardly two have the same: the
longest of eight has 243 words on average."""
OUT_OF_MEMORY = ("OutOfMemoryError", "STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA out of memory")
"""What a traceback says of a case that does not fit: PyTorch's own words, cuBLAS's and cuDNN's, and the driver's."""
DISK_GB = 30
"""The base and the language model alone in bfloat16, and the reward model's adapter in float32."""
SMALL_CARD_GB = 0.95 * 24
"""What PyTorch may take of a card of 24 GB: the rest is CUDA's own."""


class TimeIsUp(Exception):
    """The minutes that were given are over."""


class DecodesTwice(LlavaPPOTrainer):
    """PPO that has transformers' `generate` complete the same prompts too, as the phase "transformers"."""

    gate: Gate

    def generate(self, policy: Any, inputs: Any, columns: dict[str, list], step: int | None) -> Any:
        """Ours, after theirs, each with all tokens of `response_length`."""
        length = self.args.response_length
        with self.gate.phase("transformers"), neutral_generation_config(policy), self.accelerator.autocast():
            policy.generate(
                input_ids=inputs.input_ids.masked_fill(inputs.attention_mask == 0, 0),
                attention_mask=inputs.attention_mask,
                **inputs.image_kwargs(),
                do_sample=True,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return super().generate(policy, inputs, columns, step)


def decoding_side(gate: Gate, **given: Any) -> None:
    """A PPO run whose completions all have `response_length` tokens, made by us and by transformers."""
    DecodesTwice.gate = gate
    ppo_sides.our_side(gate, trainer_class=DecodesTwice, **given)


def sides_of(case: Case, size: Size, folder: Path, steps: int, response_length: int) -> Mapping[str, Side]:
    """The runs of a case; models as `prepare` has written them, and rows, which are written here."""
    fields = BASES[case.base]
    if case.kind == "onevision":
        run = functools.partial(gpu_onevision.side, stage=case.stage, steps=steps, folder=folder / "onevision")
        in_a_process(gpu_onevision.prepare, folder / "onevision")
        return {case.name: functools.partial(limited, side=run, gb=SMALL_CARD_GB)}
    if case.kind == "lengths":
        return length_sides(case, size, folder, steps)
    if case.kind == "beside":
        return ppo_beside_trl(case, size, folder, steps, response_length)
    if case.stage == "sft":
        sft = sft_step.Step(size, case.batch, steps=steps)
        make_rows(size, folder / "rows", case.batch * steps, {"completion": sft.answer})
        return {case.name: functools.partial(sft_step.our_side, folder=folder, step=sft, **fields)}
    if case.stage == "reward":
        pairs = reward_step.Step(size, case.batch, steps=steps)
        make_rows(size, folder / "rows", case.batch * steps, dict.fromkeys(("chosen", "rejected"), pairs.answer))
        return {case.name: reward_side(folder, pairs, LlavaRewardTrainer, fields)}
    step = ppo_of(case, size, steps, response_length)
    make_rows(size, folder / "rows", case.batch * steps, {})
    side = decoding_side if case.kind == "decoding" else ppo_sides.our_side
    return {case.name: functools.partial(side, folder=folder, step=step, **fields)}


def length_sides(case: Case, size: Size, folder: Path, steps: int) -> dict[str, Side]:
    """Two trainers over the same batches, every other of which has a new length; the first has the known one."""
    fields = BASES[case.base]
    spans = [KNOWN] * case.batch + [NEW] * case.batch
    columns = ["completion"] if case.stage == "sft" else ["chosen", "rejected"]
    make_rows(size, folder / "rows", case.batch * steps, dict.fromkeys(columns, spans))
    if case.stage == "sft":
        sft = sft_step.Step(size, case.batch, steps=steps)
        both = {"ours": sft_step.our_side, "TRL": sft_step.trl_side}
        return {name: functools.partial(side, folder=folder, step=sft, **fields) for name, side in both.items()}
    pairs = reward_step.Step(size, case.batch, steps=steps)
    # TRL's trainer takes no images: it would encode both completions of a pair whole, with PyTorch's default.
    whole = {**fields, "share_prefix": False, "cudnn_attention": True}
    return {
        "ours": reward_side(folder, pairs, LlavaRewardTrainer, fields),
        "both whole": reward_side(folder, pairs, reward_step.WholeRewardTrainer, whole),
    }


def ppo_beside_trl(case: Case, size: Size, folder: Path, steps: int, response_length: int) -> dict[str, Side]:
    """Our PPO, and TRL's on text, whose three whole bases leave room for small micro-batches on a card of 80 GB."""
    fields = BASES[case.base]
    step = replace(ppo_of(case, size, steps, response_length), micro_batch=max(1, case.batch // 4))
    make_rows(size, folder / "rows", case.batch * steps, {})
    in_a_process(draw_text_model, size, folder / "text", "cpu" if "use_cpu" in fields else "cuda")
    both = {"ours": ppo_sides.our_side, "TRL on text": ppo_sides.trl_side}
    return {name: functools.partial(side, folder=folder, step=step, **fields) for name, side in both.items()}


def draw_text_model(size: Size, folder: Path, device: str) -> None:
    """Write the language model alone, for TRL's PPO."""
    make_text_model(size, folder, dtype=torch.bfloat16, device=device)


def without_upstream(case: Case) -> str | None:
    """Why there is nobody to compare a case with, if so."""
    if case.kind == "beside" and find_spec("trl.experimental.ppo") is None:
        return f"TRL {trl.__version__} has no PPO: install constraints-oldest.txt"
    return None


def reward_side(
    folder: Path, step: reward_step.Step, kind: type[LlavaRewardTrainer], fields: Mapping[str, Any]
) -> Side:
    """A run of the reward model, with the judging turn."""
    return functools.partial(reward_step.side, folder=folder, step=step, trainer_class=kind, judged=True, **fields)


@contextmanager
def planning(case: Case, size: Size, folder: Path, response_length: int) -> Iterator[Callable[[], float | None]]:
    """Plan a step in a process beside the block, whose end is the plan's too; gives what waits for the plan."""
    if case.kind != "step":
        yield lambda: None
        return
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool.apply_async(planned_gib, (case, size, folder, response_length, BASES[case.base])).get


def planned_gib(case: Case, size: Size, folder: Path, response_length: int, fields: Mapping[str, Any]) -> float:
    """What `trl-llava plan` says of a step: GiB of its worst moment."""
    quiet()
    fields = {**fields, "report_to": "none"}
    prompt = size.image_tokens + size.question + 40  # about as many of the template
    length = {"sft": prompt + 96, "reward": prompt + 96 + 200, "ppo": prompt}[case.stage]
    if case.stage == "sft":
        values = sft_step.our_values(sft_step.Step(size, case.batch), **fields)
    elif case.stage == "reward":
        values = reward_step.our_values(reward_step.Step(size, case.batch), **fields)
    else:
        values = ppo_sides.our_values(folder, ppo_of(case, size, 1, response_length), **fields)
    options = ["--gpu-memory", "80", "--stage", case.stage, "--length", str(length)]
    options += ["--judged_length", str(prompt + response_length)] if case.stage == "ppo" else []
    options += ["--shared_length", str(prompt)] if case.stage == "reward" else []
    words = stage_words(folder, size, {**values, "output_dir": folder / "planned"})
    known, rest = plan.make_parser().parse_known_args([*options, *words])
    return plan.need_of(*plan.read_job(known, rest)).worst.total / 2**30


def limited(gate: Gate, side: Side, gb: float) -> None:
    """Run a side with no more of the GPU's memory, in 10^9 bytes, than a smaller card would give it."""
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = min(total, int(gb * 1e9))
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    # Generation sizes its batches by what is free, and shall not see the rest of the large card.
    torch.cuda.mem_get_info = lambda device=None: (allowed - torch.cuda.memory_reserved(device), allowed)
    side(gate)


def run_case(case: Case, size: Size, folder: Path, runs: int, response_length: int) -> list[dict[str, Any]]:
    """Run a case of which `runs` steps count: what `alternate` returns, with the case's fields and a plan."""
    nothing = {**case._asdict(), "side": case.name, "seconds": None}
    if (reason := without_upstream(case)) is not None:
        say(f"{case.name}: {reason}")
        return [{**nothing, "run": reason}]
    turns = 2 * runs + 1 if case.kind == "lengths" else runs
    try:
        with planning(case, size, folder, response_length) as plan_of:
            found = alternate(sides_of(case, size, folder, steps_needed(turns), response_length), turns)
            planned = plan_of()
    except RuntimeError as error:
        if any(sign in str(error) for sign in OUT_OF_MEMORY):
            say(f"{case.name}: does not fit")
            return [{**nothing, "run": "does not fit"}]
        say(f"{case.name} failed:\n{error}")
        return [{**nothing, "run": "failed", "error": str(error).strip().splitlines()[-1]}]
    if case.kind == "lengths":
        found = with_lengths(found)
    return [{**run, **case._asdict(), "planned_gib": planned} for run in found]


def with_lengths(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that count, in pairs of a known length and a new one; the first pair warms up."""
    return [
        {**run, "lengths": "new" if run["run"] % 2 else "known", "run": run["run"] // 2}
        for run in found
        if run["run"] > 1
    ]


def measure(
    cases: Sequence[Case],
    run: Callable[[Case], list[dict[str, Any]]],
    note: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Run cases, and note what is found after each, until all are done or the time is up."""
    entries: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        try:
            entries += run(case)
            note(entries)
        except TimeIsUp:
            say(f"The time is up; not run: {', '.join(left.name for left in cases[number:])}")
            break
    return entries


@contextmanager
def stopping_after(minutes: float) -> Iterator[None]:
    """Raise `TimeIsUp` inside once so many minutes are over, or on SIGTERM."""

    def stop(*_: object) -> NoReturn:
        raise TimeIsUp

    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def prepare(size: Size, folder: Path, device: str) -> None:
    """Write base and reward model, drawn on a device."""
    place = {"dtype": torch.bfloat16, "device": device}
    base = make_base(size, folder / "base", **place)
    make_reward(base, size, folder / "reward", **place)


def draw_models(size: Size, folder: Path) -> None:
    """Write the models, if the disk has room for them."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < DISK_GB * size.layers / SEVEN_B.layers:
        raise SystemExit(f"error: the models take {DISK_GB} GB, but {folder} has {free:.0f} GB free: give --folder")
    start = time.monotonic()
    in_a_process(prepare, size, folder, "cuda")
    say(f"Models of {size.layers} layers drawn in {time.monotonic() - start:.0f} s")


def in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a process of its own: what it leaves on the card would be missing in those of the sides."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed (exit code {process.exitcode}); see above")


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(runs=2)
    parser.add_argument("--minutes", type=float, default=6.0, help="stop after so many")
    parser.add_argument("--layers", type=int, default=SEVEN_B.layers, help="of the language model, for a quick look")
    parser.add_argument("--only", nargs="+", default=[], help="kinds, stages or bases of cases, e.g. decoding nf4")
    parser.add_argument("--response-length", type=int, default=256, help="limit of PPO's completions")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak, if the card is not known here")
    parser.add_argument("--bandwidth-gbs", type=float, help="memory bandwidth, if the card is not known here")
    parser.add_argument("--folder", help="where the temporary 30 GB go")
    return parser


def main(words: Sequence[str]) -> None:
    """Measure, print the tables and write them as JSON."""
    options = make_parser().parse_args(words)
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device: this benchmark measures a GPU (the others run on a CPU)")
    if torch.cuda.device_count() > 1:  # a trainer would split its batches over all that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    quiet()
    properties = torch.cuda.get_device_properties(0)
    card = find_card(properties.name, options.peak_tflops, options.bandwidth_gbs)
    say(
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB; by its data sheet {card.tflops} TFLOP/s "
        f"bfloat16, {card.gbs} GB/s"
    )
    size = replace(SEVEN_B, layers=options.layers)

    def note(entries: list[dict[str, Any]]) -> None:
        text, ratios = tables(entries, size, card, options.response_length)
        print(text, flush=True)
        if options.json is not None:
            write_json(options.json, ratios, entries)

    wanted = [case for case in CASES if set(options.only) <= {case.kind, case.stage, case.base}]
    with stopping_after(options.minutes), tempfile.TemporaryDirectory(dir=options.folder) as name:
        try:
            draw_models(size, Path(name))
        except TimeIsUp:
            raise SystemExit("error: the time was up before the models were drawn: give more --minutes") from None
        run = functools.partial(
            run_case, size=size, folder=Path(name), runs=options.runs, response_length=options.response_length
        )
        entries = measure(wanted, run, note)
    faults = [f"{entry['side']}: {entry['error']}" for entry in entries if "error" in entry]
    if faults:
        raise SystemExit(f"error: {len(faults)} cases failed, see above: {'; '.join(faults)}")


if __name__ == "__main__":
    main(sys.argv[1:])
