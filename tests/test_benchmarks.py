"""The benchmarks: their arithmetic on literal numbers, the sides at toy size, and what they print and write."""

import importlib
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from benchmarks import (
    factual_gain,
    gpu,
    gpu_onevision,
    gpu_tables,
    gpu_work,
    ppo_sides,
    ppo_step,
    reward_step,
    scaling,
    sft_step,
    tables,
    workload,
)
from benchmarks.gate import Gate
from benchmarks.paper_schedule import PaperSchedule
from benchmarks.tables import Ratio
from benchmarks.workload import TOY
from trl_llava import train_ppo
from trl_llava.data.collators import SFTCollator
from trl_llava.demo import stages
from trl_llava.models.load import load_processor
from trl_llava.ppo_trainer import LlavaPPOTrainer

STEP = ppo_sides.Step(TOY, lengths=(2, 5, 8, 3), response_length=8, micro_batch=2, epochs=2, steps=2)
SIDES = {"ppo_step": ppo_step, "reward_step": reward_step, "sft_step": sft_step}


class OpenGate(Gate):
    """A gate in this process: it never waits, and keeps what is reported."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        super().__init__(SimpleNamespace(send=self.steps.append, recv=lambda: "go"))


def entry(run: int | str, side: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "run": run,
        "side": side,
        "seconds": seconds,
        "peak_mib": 10 * seconds,
        "held_mib": seconds,
        "peaks": {"rest": 10 * seconds},
        "phases": {"rest": seconds},
        **more,
    }


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_ratio_is_the_median_of_the_runs_ratios() -> None:
    runs = [entry(1, "a", 1.0), entry(1, "b", 2.0), entry(2, "a", 3.0), entry(2, "b", 4.0), entry(3, "a", 2.0)]
    runs += [entry(3, "b", 20.0), entry("counted", "a", 1000.0)]
    assert tables.ratio_of(runs, Ratio("a", "b", "seconds")) == 0.5  # of 0.5, 0.75 and 0.1
    assert tables.ratio_of(runs, Ratio("a", "b", "seconds", more_is_better=True)) == 2.0
    assert tables.ratio_of(runs, Ratio("a", "b", "peak_mib")) == 0.5
    assert tables.median_of(runs, "a", "phases", "rest") == 2.0
    assert tables.median_of(runs, "a", "phases", "images") == 0.0


def test_tables_can_be_pasted() -> None:
    rows = [{"side": "a", "s": 0.12345, "MiB": 12345.6}, {"side": "b", "s": None, "MiB": 0}]
    assert tables.markdown(rows) == "| side | s | MiB |\n| --- | --- | --- |\n| a | 0.123 | 12346 |\n| b |  | 0 |"


@pytest.mark.parametrize("name", SIDES)
def test_json_holds_medians_and_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = SIDES[name]
    sides = dict.fromkeys(side for ratio in module.RATIOS.values() for side in (ratio.side, ratio.against))
    runs = [entry(run, side, 1.0 + run * place) for run in (1, 2, 3) for place, side in enumerate(sides)]
    steps = []
    monkeypatch.setattr(module, "measure", lambda step, count, *_: steps.append((step.steps, count)) or runs)
    module.main(["--runs", "3", "--json", str(tmp_path / "found.json")])
    assert steps == [(5, 3)]  # warming up, three that count, one that never begins
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"ratios": found["ratios"], "runs": runs}
    assert found["ratios"] == {key: tables.ratio_of(runs, ratio) for key, ratio in module.RATIOS.items()}
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in module.RATIOS)


def test_half_a_measurement_has_half_of_the_ratios() -> None:
    runs = [entry(1, ppo_step.OURS, 1.0), entry(1, ppo_step.PAPER, 2.0)]
    assert list(ppo_step.measured(runs)) == ["time_vs_paper_schedule"]


def test_growth_is_the_slope_of_the_logarithms() -> None:
    assert scaling.order_of_growth((144, 2.0), (576, 32.0)) == 2.0
    runs = [{**entry(1, f"batch {n}", float(n)), "growing": "batch", "value": n} for n in (4, 8, 16)]
    assert scaling.growth(runs) == {"seconds by batch": 1.0, "peak_mib by batch": 1.0}
    assert scaling.table(runs).splitlines()[-1] == "| batch | 16 | 4 | 16 | 4 | 160 | 4 | 16 |"
    steps = scaling.points("response length", (32, 128), replace(STEP, lengths=(0,) * 4))
    assert steps[128].lengths == (32, 64, 96, 128) and steps[32].response_length == 32


def test_work_of_a_pass_by_hand() -> None:
    size = workload.Size(vocabulary=10, hidden=4, layers=1, tower_hidden=2, tower_layers=1, image_tokens=1)
    assert size.intermediate == 16 and gpu_work.layer_weights(size) == 4 * 16 + 3 * 64
    # 256 weights x 2 x 5 tokens, attention 2 x 4 x (9 + 4), head 2 x 40 x 1
    assert gpu_work.pass_flops(size, [3, 2], 1, 0) == 2560 + 104 + 80
    assert gpu_work.pass_flops(size, [], 0, 1) == 2 * 48 * 2 + 4 * 2 * 4
    assert gpu_work.training_flops(size, [3, 2], 1, 1) == 2 * 2744 + 224
    # two tokens read 256 + 40 weights of two bytes; a cache of 3 prompt tokens twice, and one token on average twice
    assert gpu_work.decoding_bytes(size, "bf16", [3], [2]) == 2 * (512 + 80) + 2 * 4 * 2 * (6 + 2)


def test_seven_billion_weights() -> None:
    size = gpu.SEVEN_B
    assert (size.intermediate, size.image_size) == (11008, 336)
    assert gpu_work.layer_weights(size) == 6_476_005_376  # Llama-2-7B's linear layers without embedding and head


def test_a_pair_is_counted_as_it_runs_with_its_prompt_once() -> None:
    """Prompts of 16 image tokens, 6 of the question and 40 of the template; answers of 64, judging turns of 200."""
    card = gpu_work.Card(1e-6, 100)

    def row(stage: str) -> dict[str, Any]:
        return gpu_tables.step_row(gpu.Case("step", stage, "bf16", 2), TOY, [entry(1, "x", 2.0)], card, 8)

    assert (row("sft")["tokens/s"], row("reward")["tokens/s"]) == (62 + 64, 62 + 2 * 264)
    work = gpu_work.training_flops(TOY, [590, 590], 0, 2)
    assert row("reward")["of bf16 peak"] == pytest.approx(work / 2.0 / 1e6)


def test_decoding_is_compared_within_a_step_and_lengths_within_a_trainer() -> None:
    decoding = gpu.Case("decoding", "ppo", "bf16", 2)
    assert gpu_tables.ppo_of(decoding, TOY, 1, 8).lengths == (8, 8)
    assert gpu_tables.ppo_of(decoding._replace(kind="step"), TOY, 1, 8).lengths == (8, 6)
    run = entry(1, "x", 9.0, phases={"generation": 3.0, "transformers": 2.0})
    row = gpu_tables.decoding_row(decoding, TOY, [run], gpu_work.Card(1, 100), 8)
    assert (row["ms a token"], row["transformers' ms"], row["of transformers'"]) == (125.0, 250.0, 0.5)
    # One of each warms up; then pairs of steps, of a known length and of a new one. The third is slow on a busy card.
    steps = [(n, side, s * (3 if n > 3 else 1)) for n in range(1, 6) for side, s in (("ours", 2.0), ("TRL", 2.5))]
    found = [entry(n, side, s * ({"ours": 1.1, "TRL": 2.2}[side] if n % 2 else 1)) for n, side, s in steps]
    row = gpu_tables.lengths_row(gpu.Case("lengths", "sft", "bf16", 2), gpu.with_lengths(found))
    assert (row["new to known"], row["its new to known"]) == pytest.approx((1.1, 2.2))
    assert (row["ours to it, known"], row["ours to it, new"]) == pytest.approx((0.8, 0.4))
    assert (row["ours, known"], row["ours, new"]) == pytest.approx((4.0, 4.4))
    pairs = [(1, 2.0, 4.0), (2, 6.0, 8.0), (3, 3.0, 2.0)]
    sides = [(n, side, seconds) for n, ours, its in pairs for side, seconds in (("ours", ours), ("TRL on text", its))]
    found = [entry(*one, phases={}) for one in sides]
    row = gpu_tables.beside_row(gpu.Case("beside", "ppo", "bf16", 8), found)
    assert (row["our s per step"], row["its s per step"], row["ours to it"]) == (3.0, 4.0, 0.75)


def test_what_does_not_fit_is_a_row_and_so_is_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "sides_of", lambda case, *_: {case.name: None})
    faults = {1: None, 2: "torch.OutOfMemoryError: CUDA out of memory.", 4: "a traceback\nKeyError: 'x'"}

    def one_run(sides: dict[str, Any], runs: int) -> list[dict[str, Any]]:
        (name,) = sides
        if fault := faults[int(name.split()[3])]:
            raise RuntimeError(fault)
        return [entry(1, name, 2.0, gpu_mib=1000.0)]

    monkeypatch.setattr(gpu, "alternate", one_run)
    monkeypatch.setattr(gpu, "planning", lambda *_: nullcontext(lambda: 3.5))
    entries = [found for n in faults for found in gpu.run_case(gpu.Case("step", "sft", "bf16", n), TOY, Path(), 1, 8)]
    text, ratios = gpu_tables.tables(entries, TOY, gpu_work.Card(1, 100), 8)
    assert "| sft | bf16 | 1 | 2 |" in text and text.count("| 3.5 |") == 1
    assert "| step sft bf16 2 | does not fit |" in text and "| step sft bf16 4 | failed |" in text
    assert entries[2]["error"] == "KeyError: 'x'"
    assert ratios.keys() == {"step sft bf16 1 of bf16 peak", "step sft bf16 1 of bandwidth, generation"}


def test_gpu_cases_end_with_the_time_and_are_noted_one_by_one(capsys: pytest.CaptureFixture) -> None:
    cases, noted = [gpu.Case("step", stage, "bf16", 1) for stage in ("ppo", "sft", "reward")], []

    def run(case: gpu.Case) -> list[dict[str, Any]]:
        while case.stage == "sft":
            time.sleep(0.01)
        return [entry(1, case.name, 1.0)]

    with gpu.stopping_after(0.5 / 60):
        found = gpu.measure(cases, run, lambda entries: noted.append(len(entries)))
    assert [one["side"] for one in found] == ["step ppo bf16 1"] and noted == [1]
    assert "not run: step sft bf16 1, step reward bf16 1" in capsys.readouterr().out


def test_a_smaller_card_is_all_that_a_case_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of PyTorch is not needed for what is asked of it."""
    shares: list[float] = []
    card = SimpleNamespace(total_memory=int(150e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(149e9), int(150e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: int(14e9))
    free = []
    gpu.limited(None, lambda gate: free.append(torch.cuda.mem_get_info()), 22.5)
    assert (shares, free) == ([0.15], [(int(8.5e9), int(22.5e9))])


def test_cards_are_known_or_described() -> None:
    assert gpu_work.find_card("NVIDIA H100 PCIe", None, None).gbs == 2000
    assert gpu_work.find_card("NVIDIA L40S", None, None).tflops == 362
    assert gpu_work.find_card("NVIDIA L40", None, None).tflops == 181  # and not the L4, whose name is part of it
    assert gpu_work.find_card("NVIDIA A10G", None, None).tflops == 70
    assert gpu_work.find_card("NVIDIA GH200 480GB", None, None).gbs == 4000
    assert gpu_work.find_card("NVIDIA H200", None, None) == (989, 4800)
    assert gpu_work.find_card("NVIDIA A100-SXM4-40GB", None, None).gbs == 1555
    assert gpu_work.find_card("NVIDIA A100 80GB PCIe", None, None).gbs == 1935
    assert gpu_work.find_card("NVIDIA GeForce RTX 4090", None, None) == (165, 1008)
    for unknown in ("NVIDIA RTX A4000", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "Tesla T4"):
        with pytest.raises(SystemExit, match="is not known here"):
            gpu_work.find_card(unknown, None, None)
    assert gpu_work.find_card("Fancy 1", 10.0, 20.0) == (10.0, 20.0)
    with pytest.raises(SystemExit, match="--peak-tflops"):
        gpu_work.find_card("Fancy 1", None, 20.0)


def test_gpu_benchmark_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])


def test_answers_get_the_lengths_they_shall_have() -> None:
    schedule = ppo_sides.StopSchedule([1, 2], prompt_length=3, stop_token=0)
    first = schedule(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[-1.0, 5.0], [9.0, 5.0]]))
    assert first.argmax(1).tolist() == [0, 1] and first.softmax(1).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    second = schedule(torch.zeros(2, 4, dtype=torch.long), torch.tensor([[9.0, 5.0], [-1.0, 5.0]]))
    assert second.argmax(1).tolist() == [1, 0]


def test_factual_gain_prints_mean_and_spread_over_the_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plans = []

    def run_seed(folder: Path, seed: int, plan: stages.Plan) -> dict[str, dict[str, float]]:
        plans.append(plan)
        return {"SFT": dict.fromkeys(factual_gain.MEASURES, 0.25 + 0.5 * seed)}

    monkeypatch.setattr(factual_gain, "run_seed", run_seed)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    words = ["--seeds", "0", "1", "--output_dir", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json")]
    factual_gain.main([*words, "--quick"])
    assert plans == [stages.QUICK] * 2
    assert "| SFT |  | 0.500 +- 0.354 | " in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["seeds"]["1"]["SFT"]["recall"] == 0.75
    factual_gain.main(words)
    assert plans[2:] == [stages.FULL] * 2


def test_the_ablation_compares_each_term_with_the_same_seeds_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert factual_gain.half_width([1.0, 2.0, 3.0]) == pytest.approx(2.484, abs=1e-3)  # 4.303 x 1 / sqrt(3)

    def run_terms(folder: Path, seed: int, plan: stages.Plan) -> dict[str, dict[str, float]]:
        rows = {label: dict.fromkeys(factual_gain.MEASURES, 0.5 + seed) for label in ("SFT", *factual_gain.TERMS)}
        rows["captions, length penalty"]["length"] = 0.25 * seed
        return rows

    monkeypatch.setattr(factual_gain, "run_terms", run_terms)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    words = ["--terms", "--output_dir", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json")]
    factual_gain.main([*words, "--seeds", "0", "1", "2"])
    means, between = capsys.readouterr().out.split("More than 'captions' with the same seed:")
    assert "| captions | " in means and "| 1.500 +- 2.484 | " in means and "| captions | " not in between
    # -0.5, -1.25 and -2 more than the start of each seed
    assert next(line for line in between.splitlines() if "| captions, length penalty | " in line).endswith(
        " | -1.250 +- 1.863 |  |"
    )
    with pytest.raises(SystemExit):
        factual_gain.main([*words, "--seeds", *map(str, range(11))])


# --- sides -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    ppo_sides.prepare(folder, STEP)
    return folder


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a side changes in its process."""
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)
    monkeypatch.setattr(train_ppo, "LlavaPPOTrainer", LlavaPPOTrainer)


def test_completions_have_the_lengths_that_are_forced(prepared: Path, unpatched: None, tmp_path: Path) -> None:
    lengths: list[float] = []

    class Kept(LlavaPPOTrainer):
        def log_step(self, rollout: Any, update_metrics: Any) -> None:
            lengths.append(rollout.mask.sum(1).tolist())
            super().log_step(rollout, update_metrics)

    ppo_sides.our_side(OpenGate(), prepared, STEP, Kept)
    assert lengths == [list(STEP.lengths)] * 2


def test_the_peak_of_a_phase_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = OpenGate()
    gate.on_train_begin()
    kept = []
    with gate.phase("wide"):
        kept.append(bytearray(b"x" * 2**26))
        kept.clear()
    with gate.phase("narrow"):
        kept.append(bytearray(b"x" * 2**24))
    gate.report()
    step = gate.steps[-1]
    assert step["peak_mib"] == max(step["peaks"].values()) == step["peaks"]["wide"]
    assert step["peaks"]["wide"] - step["held_mib"] >= 60 and step["peaks"]["wide"] - step["peaks"]["narrow"] >= 40


def test_text_prompts_are_as_long_as_those_with_pictures(prepared: Path) -> None:
    prompts = ppo_sides.text_prompts(prepared)
    texts = 16 + 1 + 6 + 24  # picture, its line break's neighbour, question, template
    assert {len(prompt) for prompt in prompts} == {len(prompts[0])} and abs(len(prompts[0]) - texts) < 8
    assert all(workload.SPECIAL.index("<image>") not in prompt for prompt in prompts)


def test_the_papers_schedule_computes_what_ours_does(prepared: Path, unpatched: None) -> None:
    logs: list[Any] = []

    def keep(trainer_class: type[LlavaPPOTrainer]) -> type[LlavaPPOTrainer]:
        class Kept(trainer_class):  # type: ignore[misc,valid-type]
            def train(self, *args: Any, **kwargs: Any) -> None:
                super().train(*args, **kwargs)
                logs.append(self.state.log_history)

        return Kept

    gates = [OpenGate(), OpenGate()]
    for gate, trainer_class, fields in zip(
        gates, (LlavaPPOTrainer, PaperSchedule), ({}, {"share_base": False}), strict=True
    ):
        ppo_sides.our_side(gate, prepared, STEP, keep(trainer_class), **fields)
    ours, papers = logs
    for mine, other in zip(ours[:2], papers[:2], strict=True):
        assert mine["completions/mean_length"] == other["completions/mean_length"] == 4.5
        for name in ("objective/kl", "objective/scores"):
            assert mine[name] == pytest.approx(other[name], abs=2e-5), name
        # Ours gives the image token no probability: 1 / 300 of it at each of 4.5 tokens.
        assert mine["objective/entropy"] == pytest.approx(other["objective/entropy"] - 0.015, abs=2e-3)
    assert ours[1]["objective/kl"] > 0  # so the second step saw what the first had learned, on both sides
    for gate in gates:
        bare, *steps = gate.steps
        assert bare == {"ready": True} and len(steps) == 2
        for step in steps:
            assert step["phases"].keys() >= {"generation", "forward", "score", "update", "rest"}
            assert sum(step["phases"].values()) == pytest.approx(step["seconds"])


def test_both_sft_sides_learn_the_same_tokens(tmp_path: Path) -> None:
    step = sft_step.Step(TOY, rows=3, answer=(2, 6))
    sft_step.prepare(tmp_path, step)
    processor = load_processor(str(tmp_path / "base"))
    theirs = importlib.import_module("trl.trainer.sft_trainer").DataCollatorForVisionLanguageModeling(
        processor, completion_only_loss=True
    )(list(sft_step.trl_rows(tmp_path)))
    rows = importlib.import_module("trl_llava.data.load").rows_from(sft_step.trl_rows(tmp_path), "sft", name="rows")
    ours = SFTCollator(processor)(list(rows))
    for row in range(3):
        assert ours["labels"][row][ours["labels"][row] != -100].tolist() == [
            token for token in theirs["labels"][row].tolist() if token != -100
        ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIDES)
def test_sides_run_in_turn_in_processes_of_their_own(name: str, tmp_path: Path) -> None:
    module = SIDES[name]
    small = {"rows": 2} if name == "sft_step" else {"pairs": 2} if name == "reward_step" else {}
    step = replace(STEP, steps=4) if name == "ppo_step" else module.Step(TOY, answer=(2, 6), steps=4, **small)
    runs = module.measure(step, 1)
    sides = {side for ratio in module.RATIOS.values() for side in (ratio.side, ratio.against)}
    assert {run["side"] for run in runs if run["run"] == 1} == sides
    assert len([run for run in runs if run["run"] == 1]) == len(sides)
    counted = [run for run in runs if run["run"] == "counted"]
    assert counted and all(sum(run["flops"].values()) > 0 for run in counted)
    tables.report(runs, module.RATIOS, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["ratios"].keys() == module.RATIOS.keys()


@pytest.mark.slow
def test_processes_share_a_batch(tmp_path: Path) -> None:
    start = replace(STEP, steps=4, lengths=(0,) * 4)
    runs = scaling.measure("processes", scaling.points("processes", (1, 2), start), 1)
    assert [run["value"] for run in runs] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        gpu.Case("step", "sft", "nf4", 2),
        gpu.Case("step", "reward", "bf16", 2),
        gpu.Case("decoding", "ppo", "nf4", 2),
        gpu.Case("lengths", "sft", "bf16", 2),
        gpu.Case("lengths", "reward", "bf16", 2),
        gpu.Case("beside", "ppo", "bf16", 4),
    ],
    ids=lambda case: case.name,
)
def test_gpu_cases_at_toy_size_on_the_cpu(case: gpu.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # bfloat16 on a CPU has to be asked for.
    monkeypatch.setitem(gpu.BASES, case.base, {**gpu.BASES[case.base], "use_cpu": True})
    monkeypatch.setattr(gpu, "KNOWN", (5, 5))
    monkeypatch.setattr(gpu, "NEW", (6, 9))
    size = replace(TOY, hidden=64)
    gpu.prepare(size, tmp_path, "cpu")
    entries = gpu.run_case(case, size, tmp_path, 1, 8)
    text, ratios = gpu_tables.tables(entries, size, gpu_work.Card(1, 100), 8)
    if case.kind == "beside" and find_spec("trl.experimental.ppo") is None:
        assert "has no PPO" in text and len(entries) == 1
        return
    assert all(found["seconds"] for found in entries), entries
    assert len(entries) == {"lengths": 4, "beside": 2}.get(case.kind, 1)
    assert f"| {case.stage} | {case.base} | {case.batch} |" in text and ratios


@pytest.mark.slow
@pytest.mark.parametrize("stage", gpu_onevision.ENTRIES)
def test_onevision_recipes_at_toy_size_on_the_cpu(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")  # for the video part of the processor
    size = workload.Size(vocabulary=300, hidden=56, layers=2, heads=14, tower_hidden=64, tower_layers=2, rank=4)
    gpu_onevision.prepare(tmp_path, size, "cpu", 28)
    monkeypatch.setattr(gpu_onevision, "PIXELS", 56)
    gate = OpenGate()
    monkeypatch.chdir(gpu_onevision.RECIPES.parents[1])
    more = {"response_length": 256, "local_rollout_forward_batch_size": 4} if stage == "ppo" else {}
    gpu_onevision.side(gate, stage, 1, tmp_path, use_cpu=True, **more)
    assert len([step for step in gate.steps if "seconds" in step]) == 1


@pytest.mark.slow
def test_the_ablation_runs_to_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    words = ["--terms", "--quick", "--seeds", "0", "--output_dir", str(tmp_path / "runs")]
    factual_gain.main([*words, "--json", str(tmp_path / "found.json")])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "found.json").read_text())["seeds"]["0"]
    assert list(rows) == ["SFT", *factual_gain.TERMS]
    assert rows["captions"]["accuracy"] > rows["no captions"]["accuracy"] and 0 <= rows["captions"]["unfinished"] <= 1
    # The terms do something: the same SFT policy has become a different one for each.
    assert len({rows[label]["length"] for label in factual_gain.TERMS}) > 3
    assert "| captions, bonus for No | " in capsys.readouterr().out
