"""PPO steps whose completions a real vLLM makes, on a server and colocated: it computes what the policy computes.

`make test-vllm` runs these; each test of a server has one of its own on a loopback port.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from datasets import Dataset, List
from datasets import Image as ImageColumn
from PIL import Image

on_cpu = pytest.importorskip("on_cpu", reason="needs a vLLM for CPUs: make test-vllm", exc_type=ImportError)

import models
from test_vllm_rollouts import greedy
from tiny_trainers import even_tokens, make_adapter, ppo_trainer
from transformers import AutoProcessor

from trl_llava.models.vision_tower import set_square_padding
from trl_llava.ppo.vllm_server import RolloutEngineError, start_command
from trl_llava.ppo_trainer import LlavaPPOTrainer

pytestmark = pytest.mark.vllm
SIZES = [(40, 32), (100, 30), (30, 90), (28, 28), (57, 56), (200, 150), (33, 77), (64, 64)]
IMAGES = [2, 1, 0, 1, 1, 2, 1, 0]
ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}


def whole_modules(family: str, projector: bool) -> list[str] | None:
    """What is trained whole beside the adapter: the projector, or nothing."""
    return [{"qwen2_5_vl": "merger"}.get(family, "multi_modal_projector")] if projector else None


def picture(row: int, size: tuple[int, int]) -> Image.Image:
    gradient = Image.linear_gradient("L").resize(size).rotate(90 * (row % 4))
    return Image.merge(
        "RGB", [gradient, gradient.transpose(Image.Transpose.FLIP_TOP_BOTTOM), Image.new("L", size, 40 * row)]
    )


def rows(family: str) -> Dataset:
    """Eight prompts: with no image, one and two (OneVision: at most one), of eight sizes."""
    most = 1 if family == "llava_onevision" else 2
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"What is in picture {row}?"}] for row in range(8)],
            "images": [
                [picture(row, SIZES[(row + 3 * place) % 8]) for place in range(min(most, IMAGES[row]))]
                for row in range(8)
            ],
        }
    ).cast_column("images", List(ImageColumn()))


class Server:
    """The server of the command that messages name, on a CPU and with a tiny model, inside a `with` block."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> "Server":
        mode, *command = shlex.split(start_command(str(self.folder), torch.float32))
        assert command[:2] == ["vllm", "serve"]
        here = ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "1024", "--enforce-eager"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "serve.py"), *command[2:], *here],
                env={**os.environ, **ENVIRONMENT, **dict([mode.split("=")])},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:  # an interrupt too: it would be left running
            self.close()
            raise
        return self

    def _wait(self) -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            try:
                requests.get(f"http://127.0.0.1:{self.port}/health", timeout=1).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(1)
        raise RuntimeError("the server did not start: " + self.log.read_text()[-2000:])

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End it and all of its processes; may be called twice."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def settings(self) -> dict[str, Any]:
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{self.port}"}


def group_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    return models.make(request.param, folder)


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(base, tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running


@pytest.fixture(autouse=True)
def without_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu.train_without_nccl(monkeypatch.setattr)


def trainer_on(base: Path, folder: Path, *, whole: list[str] | None = None, **changes: Any) -> LlavaPPOTrainer:
    """A trainer of eight rows and two updates; the modules `whole` are trained too, and differ from the base's."""
    adapter = make_adapter(base, folder / "adapter", trained_whole=whole)
    settings = {
        "train_dataset": rows(base.name),
        "per_device_train_batch_size": 4,
        "total_episodes": 16,
        "response_length": 16,
        "learning_rate": 0.02,
        "vllm_logprob_tolerance": 1e-4,
        "use_cpu": True,
        "seed": 3,
        **changes,
    }
    return ppo_trainer(base, adapter, folder / "run", **settings)


def check(trainer: LlavaPPOTrainer) -> None:
    """Greedy completions are the policy's own before and after two updates, and so are log-probabilities."""
    theirs, ours = greedy(trainer, next(iter(trainer._batches_from(0))))
    assert theirs == ours
    trainer.train()
    assert trainer.state.global_step == 2
    after, ours = greedy(trainer, next(iter(trainer._batches_from(0))))
    assert after == ours
    assert after != theirs
    logged = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in logged) < 1e-4


@pytest.mark.parametrize("base", models.FAMILIES, indirect=True)
@pytest.mark.parametrize("projector", [False, True], ids=["adapter", "projector"])
def test_a_server_computes_what_the_policy_computes(
    base: Path, projector: bool, server: Server, tmp_path: Path
) -> None:
    whole = whole_modules(base.name, projector)
    check(trainer_on(base, tmp_path, whole=whole, vllm_group_port=group_port(), **server.settings))


@pytest.mark.parametrize("base", ["llava"], indirect=True)
def test_copies_of_a_prompt_and_images_padded_to_a_square(base: Path, server: Server, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(base)
    set_square_padding(processor, True)
    check(
        trainer_on(
            base,
            tmp_path,
            processing_class=processor,
            num_generations_per_prompt=4,
            temperature=0.7,
            vllm_group_port=group_port(),
            **server.settings,
        )
    )


@pytest.mark.parametrize("base", ["llava"], indirect=True)
def test_a_run_goes_on_after_its_server_has_died(base: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 24}

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        reward.calls += 1
        if reward.calls == 2:
            first.close()
        return even_tokens(completion_ids)

    reward.calls = 0
    with Server(base, tmp_path / "first.txt") as first:
        port = {"vllm_group_port": group_port(), **first.settings}
        trainer = trainer_on(base, tmp_path, reward_funcs=reward, **saving, **port)
        with pytest.raises(RolloutEngineError, match="start the server again"):
            trainer.train()
    with Server(base, tmp_path / "second.txt") as second:
        port = {"vllm_group_port": group_port(), **second.settings}
        trainer = trainer_on(base, tmp_path, **saving, **port)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3
        theirs, ours = greedy(trainer, next(iter(trainer._batches_from(0))))
        assert theirs == ours


@pytest.mark.parametrize("base", ["llava"], indirect=True)
def test_a_server_left_inside_an_update_says_so_at_once(base: Path, server: Server, tmp_path: Path) -> None:
    """Last of those that share a server: afterwards it is of no use."""
    trainer = trainer_on(base, tmp_path, vllm_group_port=group_port(), **server.settings)
    # what a run does that is then killed
    requests.post(f"{server.settings['vllm_server_base_url']}/start_weight_update", json={}).raise_for_status()
    start = time.monotonic()
    with pytest.raises(RolloutEngineError, match="start the server again"):
        trainer.train()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("base", models.FAMILIES, indirect=True)
@pytest.mark.parametrize("projector", [False, True], ids=["adapter", "projector"])
def test_a_colocated_engine_computes_what_the_policy_computes(base: Path, projector: bool, tmp_path: Path) -> None:
    """In a process of its own: an engine does not leave its process as it was."""
    whole = whole_modules(base.name, projector) or []
    words = [sys.executable, str(Path(__file__).parent / "colocated.py"), str(base), str(tmp_path), *whole]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "computes what the policy computes" in done.stdout
