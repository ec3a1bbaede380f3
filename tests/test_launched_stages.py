"""Really launched processes train as one with the same global batch does: all stages, saved and resumed too."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import BACKENDS, launch, run_words, write_rows

STAGES = ("sft", "reward", "ppo")
# Measured times, and what TRL and transformers count anew after a restart.
NOT_COMPARED = ("time/", "tokens_per_second", "eps", "runtime", "per_second", "flos")
NOT_RESUMED = (*NOT_COMPARED, "num_tokens", "train_loss")


@pytest.fixture(scope="module")
def work(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, an adapter and a reward model to start PPO from, and the runs of one process, in `one/`."""
    folder = tmp_path_factory.mktemp("stages")
    write_rows(folder)
    for stage in ("sft", "reward"):
        run(stage, run_words(folder, tiny_llava_dir, folder / "start", stage, 1, "--max_steps", "1"))
    for stage in STAGES:
        run(stage, run_words(folder, tiny_llava_dir, folder / "one", stage, 1))
    return folder


def run(stage: str, words: list[str]) -> None:
    importlib.import_module(f"trl_llava.train_{stage}").main(words)


@pytest.fixture(
    scope="module",
    params=["ddp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)],
)
def two(request: pytest.FixtureRequest, work: Path, tiny_llava_dir: Path) -> Path:
    """The same runs on two processes, and again in `resumed/` from their second checkpoint."""
    if request.param != "ddp":
        pytest.importorskip("deepspeed", reason="needs the `deepspeed` extra")
    out = work / request.param
    out.mkdir()
    plan = [(stage, run_words(work, tiny_llava_dir, out, stage, 2)) for stage in STAGES]
    for stage in STAGES:
        resume = ["--resume_from_checkpoint", f"{out}/{stage}/checkpoint-2"]
        plan.append((stage, run_words(work, tiny_llava_dir, out / "resumed", stage, 2, *resume)))
    (out / "plan.json").write_text(json.dumps(plan))
    finished = launch(out, BACKENDS[request.param], 2, "launched_stages.py", str(out / "plan.json"))
    assert finished.returncode == 0, finished.stderr[-5000:]
    return out


def log_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def assert_same_logs(actual: Path, expected: Path, without: tuple[str, ...]) -> None:
    assert len(log_of(actual)) == len(log_of(expected))
    for entry, wanted in zip(log_of(actual), log_of(expected), strict=True):
        for name, value in wanted.items():
            if not any(part in name for part in without):
                assert entry[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, wanted.get("step"))


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_log_and_train_as_one(work: Path, two: Path, stage: str) -> None:
    assert_same_logs(two / stage, work / "one" / stage, NOT_COMPARED)
    parts = ["adapter_model.safetensors"] + ["value_model/adapter_model.safetensors"] * (stage == "ppo")
    for part in parts:
        expected, actual = (load_file(folder / stage / part) for folder in (work / "one", two))
        assert expected.keys() == actual.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(actual[name], weight, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_resume_as_if_never_stopped(two: Path, stage: str) -> None:
    assert_same_logs(two / "resumed" / stage, two / stage, NOT_RESUMED)
    expected, actual = (load_file(folder / stage / "adapter_model.safetensors") for folder in (two, two / "resumed"))
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())
