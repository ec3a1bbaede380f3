"""Really launched processes whose prompts a loopback server answers: as one process, and all stop if it fails."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from stage_runs import BACKENDS, launch, run_words, write_rows
from tiny_vllm import TinyServer, pretend_vllm

from trl_llava import train_ppo

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launched_vllm")]
NOT_COMPARED = ("time/", "tokens_per_second", "eps")


@pytest.fixture(scope="module")
def work(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and an adapter and a reward model to start from."""
    folder = tmp_path_factory.mktemp("vllm")
    write_rows(folder)
    for stage in ("sft", "reward"):
        words = run_words(folder, tiny_llava_dir, folder / "start", stage, 1, "--max_steps", "1")
        importlib.import_module(f"trl_llava.train_{stage}").main(words)
    return folder


def words(work: Path, base: Path, out: Path, processes: int, server: TinyServer) -> list[str]:
    vllm = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", server.url]
    return run_words(work, base, out, "ppo", processes, *vllm, "--num_generations_per_prompt", "2")


def log_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def one(work: Path, tiny_llava_dir: Path) -> Path:
    """The run of one process."""
    with pytest.MonkeyPatch.context() as patch, TinyServer(tiny_llava_dir) as server:
        pretend_vllm(lambda *what: patch.setattr(*what, raising=False))
        train_ppo.main(words(work, tiny_llava_dir, work / "one", 1, server))
    return work / "one" / "ppo"


@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_two_processes_train_as_one(backend: str, one: Path, work: Path, tiny_llava_dir: Path) -> None:
    out = work / backend
    out.mkdir()
    with TinyServer(tiny_llava_dir) as server:
        given = words(work, tiny_llava_dir, out, 2, server)
        status, errors = launch(out, BACKENDS[backend], 2, "launched_vllm.py", *given)
        assert status == 0, errors[-5000:]
        # The main process speaks for both.
        assert len(server.bodies("/init_weight_transfer_engine")) == 1
        assert len(server.bodies("/update_weights")) == 3
        assert len(server.bodies("/inference/v1/generate")) == 6
    logs, expected = log_of(out / "ppo"), log_of(one)
    assert len(logs) == len(expected) == 3
    for entry, wanted in zip(logs, expected, strict=True):
        for name, value in wanted.items():
            if not any(part in name for part in NOT_COMPARED):
                assert entry[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, wanted.get("step"))


def test_all_stop_if_the_server_fails(work: Path, tiny_llava_dir: Path) -> None:
    def broken(answer: dict[str, Any]) -> dict[str, Any]:
        raise ConnectionError

    out = work / "failing"
    out.mkdir()
    with TinyServer(tiny_llava_dir) as server:
        server.faults["/inference/v1/generate"] = broken
        given = words(work, tiny_llava_dir, out, 2, server)
        status, errors = launch(out, BACKENDS["ddp"], 2, "launched_vllm.py", *given)
    assert status == 1
    assert f"the vLLM server at {server.url} failed (ConnectionError" in errors
    assert "resume_from_checkpoint" in errors
    assert "Traceback" not in errors.split("the vLLM server")[0]
