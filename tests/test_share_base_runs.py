"""A PPO run whose roles share a base: the same numbers and files as with separate copies, in less memory."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import test_entry_points
import torch
from safetensors.torch import load_file
from test_entry_points import Work, copy_after_one_step
from test_shared_base import args_for

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.models import loaded_models
from trl_llava.models.adapter_role import AdapterRole
from trl_llava.models.load import load_policy

# The norm is summed up in the order of the parameters, which sharing changes: clipping would carry its rounding on.
UNCLIPPED = ["--max_grad_norm", "0"]
CHECKPOINTS = ["--save_strategy", "steps", "--save_steps", "1"]
work, policy, reward_model = test_entry_points.work, test_entry_points.policy, test_entry_points.reward_model


def start(policy: Path, reward_model: Path) -> list[str]:
    return ["--sft_model_path", str(policy), "--reward_model_path", str(reward_model), "--num_ppo_epochs", "2"]


def logged(trainer: Any) -> list[dict[str, float]]:
    timed = ("time/", "tokens_per_second", "eps")
    return [{k: v for k, v in entry.items() if not k.startswith(timed)} for entry in trainer.state.log_history]


@pytest.mark.parametrize("value", ["reward", "policy"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_shared_base_gives_the_numbers_and_files_of_copies(
    work: Work, policy: Path, reward_model: Path, value: str, checkpointing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {}
    for share in ("true", "false"):
        name = f"share_{share}_{value}_{checkpointing}"
        words = ["--value_init", value, "--share_base", share, "--gradient_checkpointing", str(checkpointing).lower()]
        runs[share] = work.ppo(name, *start(policy, reward_model), *words, *UNCLIPPED), work.folder / name
        printed = capsys.readouterr().out
        assert ("1 base model loaded" if share == "true" else "3 base models loaded") in printed
    (shared, folder), (separate, other) = runs["true"], runs["false"]
    assert isinstance(shared.value_model, AdapterRole) and not isinstance(separate.value_model, AdapterRole)
    assert len(logged(shared)) == len(logged(separate)) == 2
    for ours, theirs in zip(logged(shared), logged(separate), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    files = [{str(path.relative_to(place)) for path in place.rglob("*")} for place in (folder, other)]
    assert files[0] == files[1]
    for part in ("adapter_model.safetensors", "value_model/adapter_model.safetensors"):
        ours, theirs = load_file(folder / part), load_file(other / part)
        assert ours.keys() == theirs.keys()
        for key, value_of in theirs.items():
            torch.testing.assert_close(ours[key], value_of, rtol=1e-5, atol=1e-6)
    config = json.loads((folder / "value_model" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(work.base), "SEQ_CLS")
    assert "score" in config["modules_to_save"]


@pytest.mark.slow  # dynamo takes most of a minute to trace
def test_compiled_roles_of_a_shared_base_give_the_same_numbers_under_checkpointing(
    work: Work, policy: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles no checkpointing whose recomputation switches roles: it stays outside of what is compiled."""
    for name in ("BACKEND", "MODE"):  # transformers' `TrainingArguments` writes `torch_compile` into the environment
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
    words = [*start(policy, reward_model), *UNCLIPPED, "--gradient_checkpointing", "true"]
    plain = work.ppo("not_compiled", *words)
    compiled = work.ppo("compiled", *words, "--torch_compile", "true", "--torch_compile_backend", "aot_eager")
    assert isinstance(compiled.value_model, AdapterRole)
    for ours, theirs in zip(logged(compiled), logged(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_an_8_bit_base_is_shared(
    work: Work, policy: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    runs = {}
    for share, loaded in (("true", "1 base model loaded"), ("false", "3 base models loaded")):
        words = ["--load_in_8bit", "true", "--dtype", "bfloat16", "--share_base", share, *UNCLIPPED]
        runs[share] = work.ppo(f"int8_{share}", *start(policy, reward_model), *words)
        assert loaded in capsys.readouterr().out
    assert sum(isinstance(part, bnb.nn.Linear8bitLt) for part in runs["true"].model.modules()) == 14
    for ours, theirs in zip(logged(runs["true"]), logged(runs["false"]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_a_shared_run_resumes_exactly(work: Work, policy: Path, reward_model: Path) -> None:
    words = [*start(policy, reward_model), *CHECKPOINTS]
    work.ppo("shared_whole", *words)
    copy_after_one_step(work.folder / "shared_whole", work.folder / "shared_resumed")
    work.ppo("shared_resumed", *words, "--resume_from_checkpoint", "true")
    for part in ("adapter_model.safetensors", "value_model/adapter_model.safetensors"):
        whole, resumed = (load_file(work.folder / f"shared_{run}" / part) for run in ("whole", "resumed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_checkpoint_of_copies_cannot_be_resumed_with_a_shared_base(
    work: Work, policy: Path, reward_model: Path
) -> None:
    trainer = work.ppo("copies", *start(policy, reward_model), *CHECKPOINTS, "--share_base", "false")
    shared = work.ppo("shares", *start(policy, reward_model))
    with pytest.raises(ValueError, match=r"optimizer.pt is of other parameters, or of the same in another order"):
        shared.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")


def test_the_value_model_may_start_with_the_reward_models_head(
    work: Work, policy: Path, reward_model: Path, tmp_path: Path
) -> None:
    words = [*start(policy, reward_model), "--learning_rate", "0", "--whiten_rewards", "false"]
    saved = load_file(reward_model / "adapter_model.safetensors")["base_model.model.score.weight"]
    for share in ("true", "false"):
        trainer = work.ppo(f"head_{share}", *words, "--value_head", "reward", "--share_base", share)
        name = Path(trainer.args.output_dir) / "value_model" / "adapter_model.safetensors"
        assert torch.equal(load_file(name)["base_model.model.score.weight"], saved) and saved.any()
    with pytest.raises(ValueError, match=r"adapter '.*policy' has no score head"):
        work.ppo("none", *words, "--value_head", "reward", "--value_model_path", str(policy))
    with pytest.raises(ValueError, match=r"`value_head: reward` needs a value model that starts with a head"):
        LlavaPPOConfig(value_head="reward", value_init="policy", output_dir=str(tmp_path), bf16=False)


def test_a_whole_policy_has_a_frozen_copy_as_its_reference_whose_memory_is_said(
    work: Work, reward_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded_models, "GIB", 1)  # a tiny model's bytes, not 0.00 GiB
    words = ["--model_name_or_path", str(work.base), "--reward_model_path", str(reward_model)]
    trainer = work.ppo("whole_policy", *words)
    before, after, reference = (
        dict(model.named_parameters())
        for model in (load_policy(args_for(work.base)), trainer.policy_model, trainer.ref_model)
    )
    assert any(not torch.equal(after[name], value) for name, value in before.items() if "q_proj" in name)
    assert all(torch.equal(reference[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in reference.values())
    size = sum(tensor.nbytes for tensor in (*trainer.ref_model.parameters(), *trainer.ref_model.buffers()))
    said = capsys.readouterr().out.split("Generation answers")[0].splitlines()
    name = f"  {work.base} (LlavaForConditionalGeneration) {size}.00 GiB"
    assert f"{name}: policy" in said and f"{name}: reference" in said
    (shared,) = (line for line in said if line.endswith(": value, reward"))
    beside = [p for n, p in trainer.value_model.named_parameters() if "lora_" in n or "score" in n]
    assert f" + {sum(parameter.nbytes for parameter in beside)}.00 GiB of adapters and heads" in shared
    assert any(line.startswith("3 base models loaded, ") for line in said)


def test_value_and_reward_share_a_second_base(
    work: Work, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    other = Work(tmp_path, test_entry_points.tiny_models.tiny_llava(tmp_path / "other", seed=7))
    other.reward("reward", "--use_peft", "--lora_r", "2")
    capsys.readouterr()
    logs = []
    for share in ("true", "false"):
        with caplog.at_level(logging.WARNING):
            trainer = work.ppo(f"second_{share}", *start(policy, tmp_path / "reward"), "--share_base", share)
        logs.append(logged(trainer))
        printed = capsys.readouterr().out
        assert f"{2 if share == 'true' else 3} base models loaded" in printed
        if share == "true":
            assert ": policy, reference\n" in printed and ": value, reward" in printed
            assert f"The value model gets a base of its own ({other.base}): {work.base} is loaded" in caplog.text
    assert len(logs[0]) == 2
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_a_fresh_adapter_shares_its_base_and_the_reference_is_the_bare_base(
    work: Work, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name_or_path", str(work.base), "--use_peft", "--lora_r", "2"]
    words += ["--reward_model_path", str(reward_model), "--recompute_logprobs", "true"]
    logs = []
    for share in ("true", "false"):
        logs.append(logged(work.ppo(f"fresh_{share}", *words, "--share_base", share)))
        assert f"{1 if share == 'true' else 3} base model" in capsys.readouterr().out
    assert logs[0][0]["objective/kl"] == 0.0
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("given", ["whole policy", "adapter", "whole reward model"])
def test_with_use_peft_a_value_model_from_a_whole_model_is_a_fresh_adapter(
    given: str, work: Work, policy: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--use_peft", "--lora_r", "2", *UNCLIPPED]
    bases = {"true": 1, "false": 3}
    if given == "whole policy":
        words += ["--model_name_or_path", str(work.base), "--reward_model_path", str(reward_model)]
        words += ["--value_init", "policy"]
    elif given == "adapter":  # of the same base, which it shares
        words += [*start(policy, reward_model), "--value_model_path", str(work.base)]
    else:
        work.reward("whole_reward")
        words += [*start(policy, work.folder / "whole_reward"), "--value_head", "reward"]
        bases = {"true": 3, "false": 3}
    logs, files = [], []
    for share, count in bases.items():
        name = f"fresh_value_{given}_{share}".replace(" ", "_")
        trainer = work.ppo(name, *words, "--share_base", share)
        assert f"{count} base model" in capsys.readouterr().out
        model = trainer.accelerator.unwrap_model(trainer.model)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert all("lora_" in name or "score" in name for name in trained)
        logs.append(logged(trainer))
        files.append(load_file(work.folder / name / "value_model" / "adapter_model.safetensors"))
        lora_b = {key: value for key, value in files[-1].items() if "lora_B" in key}
        assert len(lora_b) == 14 and any(value.any() for value in lora_b.values())  # 7 linear layers twice
        assert files[-1]["base_model.model.score.weight"].any()
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        torch.testing.assert_close(files[1][key], value, rtol=1e-5, atol=1e-6)


def test_a_projector_trained_in_each_adapter(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--use_peft", "--lora_r", "2", "--freeze_projector", "false"]
    work.sft("sees_policy", *words)
    work.reward("sees_reward", *words)
    words = [*start(work.folder / "sees_policy", work.folder / "sees_reward"), "--freeze_projector", "false"]
    logs = []
    for share in ("true", "false"):
        logs.append(logged(work.ppo(f"sees_{share}", *words, "--share_base", share)))
        assert f"{1 if share == 'true' else 3} base model" in capsys.readouterr().out
        for part, start_of in ((".", "sees_policy"), ("value_model", "sees_reward")):
            after, before = (
                load_file(folder / "adapter_model.safetensors")
                for folder in (work.folder / f"sees_{share}" / part, work.folder / start_of)
            )
            moved = {key for key in after if "projector" in key and not torch.equal(after[key], before[key])}
            assert len(moved) == 4
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_and_heads_are_kept_in_the_dtype_that_is_asked_for(
    work: Work, policy: Path, reward_model: Path, dtype: str
) -> None:
    trainer = work.ppo(
        f"dtype_{dtype}",
        *start(policy, reward_model),
        "--adapter_dtype",
        dtype,
        "--dtype",
        "bfloat16",
        "--bf16",
        "true",
    )
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        beside = "lora_" in name or "score" in name
        assert parameter.dtype == (getattr(torch, dtype) if beside else torch.bfloat16), name


def test_checkpointing_that_would_mix_the_roles_up_is_refused(work: Work, policy: Path, reward_model: Path) -> None:
    words = ["--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    with pytest.raises(ValueError, match="would repeat the value model's passes as the policy"):
        work.ppo("none", *start(policy, reward_model), *words)
