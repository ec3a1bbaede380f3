"""What a GPU must do as the CPU does: `pytest -m gpu`. A sample of the same functions runs on the CPU by default."""

import importlib.util
import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import Runs, outputs, planned_and_measured
from safetensors.torch import load_file
from stage_runs import NOT_RESUMED, STAGES, assert_same_logs, log_of
from test_launched_signals import stop
from test_passes import SCORE_CLASSES, make_generator, make_inputs, policy_and_value
from test_recipe_runs import RECIPES, ROOT, Workshop, run_two_steps

from benchmarks.workload import TOY, Size
from trl_llava.models.image_features import _on_the_cpu
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo import decoding

NEEDED = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = [pytest.mark.gpu, NEEDED]
ATTENTIONS = ("sdpa", "eager", "flex_attention")
WIDE = Size(hidden=1024, layers=4, heads=8, tower_hidden=256, tower_layers=4, image_tokens=256)
"""Where weights and activations are most of what a step holds: 116M parameters."""


def on_cpu(*sample: Any, slow: bool = False) -> Any:
    """A case of the sample that runs on the CPU."""
    marks = [pytest.mark.slow] if slow else []
    return pytest.param("cpu", *sample, marks=marks, id="-".join(["cpu", *map(str, sample)]))


def on_gpu(*case: Any) -> Any:
    return pytest.param("cuda", *case, marks=GPU, id="-".join(["cuda", *map(str, case)]))


DEVICES = [on_cpu(), on_gpu()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`Runs` of a device, made once."""
    made: dict[str, Runs] = {}

    def of(device: str) -> Runs:
        if device not in made:
            made[device] = Runs(tmp_path_factory.mktemp(device), device)
        return made[device]

    return of


@pytest.mark.parametrize(
    ("device", "stage", "base", "attention"),
    [
        on_cpu("sft", "bf16", "eager"),
        on_cpu("ppo", "bf16", "sdpa"),
        on_cpu("reward", "nf4", "sdpa", slow=True),
        *(on_gpu(*case, a) for case in [(s, b) for s in STAGES for b in ("bf16", "nf4", "int8")] for a in ATTENTIONS),
    ],
)
def test_each_stage_trains_on_each_base_with_each_attention(
    runs: Any, device: str, stage: str, base: str, attention: str, tmp_path: Path
) -> None:
    more = ["--attn_implementation", attention]
    # On a GPU an 8-bit layer rounds its inputs by their largest, which is another where other rows run beside them.
    more += ["--check_first_step", "false"] if (stage, base) == ("ppo", "int8") else []
    runs(device).two_steps(stage, tmp_path, base, *more)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_ppo_starts_with_ratio_1_and_no_kl(runs: Any, device: str, base: str, tmp_path: Path) -> None:
    # One optimizer step for each rollout: nothing has moved when its ratios are computed.
    own = ["--num_ppo_epochs", "1", "--num_mini_batches", "1"]
    runs(device).two_steps("ppo", tmp_path, base, *own)
    first = log_of(tmp_path / "ppo")[0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_and_scores_are_the_cpus(runs: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of convolutions; products have it off
    base = runs(device).base
    for name, expected in outputs(base, "cpu").items():
        torch.testing.assert_close(outputs(base, device)[name], expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_values_and_rewards_of_ppo_are_the_cpus(
    runs: Any, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole step in float32: the same draws, so the same completions, rewards, values and losses."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    one = ["--total_episodes", "4", "--save_strategy", "no", "--temperature", "0.7"]
    here = runs(device)
    here.run("ppo", tmp_path, "fp32", *one)
    here.run("ppo", tmp_path / "cpu", "fp32", *one, "--use_cpu", "true")
    assert_same_logs(tmp_path / "ppo", tmp_path / "cpu" / "ppo", NOT_RESUMED, tolerance=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_features_wait_on_the_cpu_unchanged_and_pinned_for_a_gpu(device: str) -> None:
    made = [torch.arange(6.0).view(2, 3), torch.full((1, 3), 7.0), torch.arange(12.0).view(2, 2, 3)]
    for kept, expected in zip(_on_the_cpu([feature.to(device) for feature in made]), made, strict=True):
        assert kept.device.type == "cpu" and kept.is_pinned() == (device == "cuda")
        assert torch.equal(kept, expected)


@pytest.mark.parametrize(
    ("device", "stage"), [on_cpu("sft"), on_cpu("ppo", slow=True), *(on_gpu(stage) for stage in STAGES)]
)
def test_a_resumed_run_is_the_uninterrupted_one(runs: Any, device: str, stage: str, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole" / stage, tmp_path / "resumed" / stage
    runs(device).run(stage, whole.parent, "fp32")
    shutil.copytree(whole, resumed)
    for later in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(resumed / later)
    runs(device).run(stage, resumed.parent, "fp32", "--resume_from_checkpoint", str(resumed / "checkpoint-1"))
    assert_same_logs(resumed, whole, NOT_RESUMED, tolerance=1e-4)
    for file in whole.glob("adapter_model.safetensors"):
        for name, tensor in load_file(file).items():
            found = load_file(resumed / file.name)[name]
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("device", [on_cpu(slow=True), on_gpu()])
def test_sigterm_ends_a_run_with_a_checkpoint(runs: Any, device: str, tmp_path: Path) -> None:
    own = ["--max_steps", "100000", "--save_strategy", "no", "--eval_strategy", "no"]
    words = runs(device).words("sft", tmp_path, "bf16", *own)
    status, said = stop(tmp_path, ["-m", "trl_llava.cli", "sft", *words], lambda run: run.send_signal(signal.SIGTERM))
    assert status == 128 + signal.SIGTERM, said[-3000:]
    (checkpoint,) = (tmp_path / "sft").glob("checkpoint-*")
    assert f"stopped by SIGTERM after step {checkpoint.name.split('-')[1]} of 100000" in said


def prompts_on(device: str, family: str, request: pytest.FixtureRequest) -> tuple[Any, ModelInputs]:
    """A policy in float32 that often ends, and prompts with 1, 0, 2 and 1 images, some of them twice."""
    folder = request.getfixturevalue(family)
    policy, _ = policy_and_value(family, folder)
    policy.get_output_embeddings().weight.data[2] *= 3
    inputs = make_inputs(family, folder).select([0, 2, 0, 1, 2, 2, 3])
    inputs.input_ids, inputs.attention_mask = inputs.input_ids.to(device), inputs.attention_mask.to(device)
    return policy.to(device), inputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", SCORE_CLASSES)
def test_recorded_decoding_draws_what_the_plain_loop_draws(
    device: str,
    family: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decoding, "BUCKET", 20)
    policy, inputs = prompts_on(device, family, request)
    settings = {"response_length": 50, "local_rollout_forward_batch_size": 7, "keep_logprobs": True}
    static = make_generator(**settings, cache_implementation="static")
    for step in (1, 2, None):
        plain = make_generator(**settings).generate(policy, inputs, step)
        found = static.generate(policy, inputs, step)
        assert torch.equal(found.responses, plain.responses)
        if step is not None:
            torch.testing.assert_close(found.logprobs, plain.logprobs, rtol=0, atol=1e-4)
    # Nothing kept it from recording.
    assert static.decoder.replays and decoding.__name__ not in {record.name for record in caplog.records}


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_cannot_be_recorded_runs_plainly_and_says_why(
    device: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    policy, inputs = prompts_on(device, "tiny_llava_dir", request)
    settings = {"response_length": 30, "local_rollout_forward_batch_size": 7}
    plain = make_generator(**settings).generate(policy, inputs, 1)
    # A layer that waits for the GPU in the middle of a step, as a recording must not.
    layer = policy.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    static = make_generator(**settings, cache_implementation="static")
    with caplog.at_level(logging.WARNING):
        found = [static.generate(policy, inputs, 1).responses for _ in range(2)]
    assert all(torch.equal(one, plain.responses) for one in found)
    said = [message for message in caplog.messages if "not replayed as a CUDA graph" in message]
    assert len(said) == (device == "cuda")  # once
    if device == "cuda":  # torch is not left in the middle of a recording
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.cuda.empty_cache()


@pytest.mark.gpu
@NEEDED
@pytest.mark.parametrize("stage", STAGES)
def test_liger_trains_alike(runs: Any, stage: str, tmp_path: Path) -> None:
    assert importlib.util.find_spec("liger_kernel") is not None, "pip install liger-kernel"
    here = runs("cuda")
    here.two_steps(stage, tmp_path / "plain", "bf16")
    here.two_steps(stage, tmp_path / "liger", "bf16", "--use_liger_kernel", "true")
    name = {"ppo": "objective/scores"}.get(stage, "loss")
    ours, theirs = (log_of(tmp_path / side / stage)[0][name] for side in ("liger", "plain"))
    assert ours == pytest.approx(theirs, rel=0.05, abs=0.05)


@pytest.mark.parametrize(
    ("device", "stage", "base"),
    [
        on_cpu("sft", "fp32", slow=True),
        on_cpu("reward", "fp32", slow=True),
        on_cpu("ppo", "fp32", slow=True),
        *(on_gpu(stage, base) for stage in STAGES for base in ("bf16", "nf4")),
    ],
)
def test_a_step_holds_what_the_plan_says(device: str, stage: str, base: str, tmp_path: Path) -> None:
    size, rows = (WIDE, 4) if device == "cuda" else (TOY, 2)
    plan, peak = planned_and_measured(stage, size, rows, device, base, tmp_path)
    assert plan == pytest.approx(peak, rel=0.1)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"), device="cuda")


@pytest.mark.gpu
@NEEDED
@pytest.mark.parametrize("name", sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml")))
def test_each_recipe_trains_as_it_is(workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run_two_steps(workshop, name)
