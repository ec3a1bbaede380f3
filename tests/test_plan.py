"""The plan of memory: held against the bytes that real steps of the trainers hold on the CPU, at toy size.

Measured is the peak of live storage, as `MemoryTrace` counts it, over two real steps. Rows differ in length, so that
there are padding masks, as in any real batch; the longest is the plan's.
"""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_trainers
import torch
from datasets import Dataset, Image, List
from transformers import AutoConfig, AutoProcessor

from trl_llava import ppo_trainer
from trl_llava.adapters import lora_config
from trl_llava.cli import main
from trl_llava.configs import LlavaModelConfig, LlavaRewardConfig, LlavaSFTConfig
from trl_llava.dry_models import QuantizedLinear, add_adapter, build_policy
from trl_llava.errors import InputError
from trl_llava.memory_model import Processes, gradients, kv_cache, optimizer_states, share, weights
from trl_llava.memory_trace import MemoryTrace
from trl_llava.plan import _make_parser, make_plan, moments, read_job
from trl_llava.plan_stages import Job, Settings
from trl_llava.policy_start import load_policy_start
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.score_start import load_score_model
from trl_llava.sft_trainer import LlavaSFTTrainer

QUIET = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "bf16": False, "max_length": None}


def values_of(config: Any) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in fields(config)}


def question(count: int = 1) -> list[dict[str, str]]:
    return [{"role": "user", "content": "What is in the picture? " * count}]


def answer(count: int) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": "There is a red square. " * count}]


def with_pictures(**columns: list[Any]) -> Dataset:
    pictures = [[tiny_models.image("red")] for _ in next(iter(columns.values()))]
    return Dataset.from_dict({**columns, "images": pictures}).cast_column("images", List(Image()))


def peak_of(trainer: Any) -> int:
    with MemoryTrace() as trace:
        trace.hold([*trainer.model.parameters(), *trainer.model.buffers()], "weights")
        trainer.train()
    return trace.peak


def longest(trainer: Any) -> int:
    return trainer.data_collator(list(trainer.train_dataset))["input_ids"].shape[1]


def planned(stage: str, args: Any, model_args: LlavaModelConfig, length: int, **changes: Any) -> int:
    settings = Settings(
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=args.gradient_checkpointing,
        four_bit=model_args.load_in_4bit,
    )
    job = Job(stage, values_of(args), model_args, Processes(), images=1, length=length, **changes)
    return max(moment.total for moment in moments(job, settings))


def sft(base: Path, folder: Path, model_args: LlavaModelConfig, **changes: Any) -> tuple[LlavaSFTTrainer, int]:
    """A trainer of SFT, and what the plan says of it."""
    rows = 4
    args = LlavaSFTConfig(
        output_dir=str(folder), per_device_train_batch_size=rows, max_steps=2, use_cpu=True, **{**QUIET, **changes}
    )
    model, peft_config = load_policy_start(model_args)
    trainer = LlavaSFTTrainer(
        model=model,
        args=args,
        train_dataset=with_pictures(messages=[question() + answer(40 - i % 2) for i in range(2 * rows)]),
        processing_class=AutoProcessor.from_pretrained(base),
        peft_config=peft_config,
    )
    return trainer, planned("sft", args, model_args, longest(trainer))


def fields_for(base: Path, **changes: Any) -> LlavaModelConfig:
    return LlavaModelConfig(
        **{"model_name_or_path": str(base), "dtype": "float32", "use_peft": True, "lora_r": 16, **changes}
    )


def test_a_trace_counts_storage_and_not_views():
    with MemoryTrace() as trace:
        kept = torch.zeros(8)
        view = kept[:4]
        both = kept + kept
        del both
    assert (trace.peak, trace.live.total()) == (64, 32)
    assert view.shape == (4,)


def test_a_trace_tells_parts_apart():
    with MemoryTrace() as trace:
        first = torch.zeros(8)
        with trace.counting_as("logits"):
            second = torch.zeros(4)
        trace.hold([first], "weights")
        trace.restart()
        third = torch.zeros(1)
    assert trace.at_peak == {"weights": 32, "logits": 16, "activations": 4}
    assert (second.shape, third.shape) == ((4,), (1,))


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": False}, {"loss_type": "nll"}])
def test_sft_needs_what_is_planned(tiny_llava_dir, tmp_path, changes):
    trainer, plan = sft(tiny_llava_dir, tmp_path, fields_for(tiny_llava_dir), **changes)
    assert plan == pytest.approx(peak_of(trainer), rel=0.03)


def test_full_fine_tuning_with_accumulation_needs_what_is_planned(tiny_llava_dir, tmp_path):
    model_args = fields_for(tiny_llava_dir, use_peft=False)
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = LlavaSFTConfig(output_dir=str(tmp_path), max_steps=2, use_cpu=True, **QUIET, **changes)
    model, _ = load_policy_start(model_args)
    trainer = LlavaSFTTrainer(
        model=model,
        args=args,
        train_dataset=with_pictures(messages=[question() + answer(40 - i) for i in range(8)]),
        processing_class=AutoProcessor.from_pretrained(tiny_llava_dir),
    )
    plan = planned("sft", args, model_args, longest(trainer))
    assert plan == pytest.approx(peak_of(trainer), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4_bit_sft_needs_what_is_planned(tiny_llava_dir, tmp_path, dtype):
    pytest.importorskip("bitsandbytes")
    model_args = fields_for(tiny_llava_dir, load_in_4bit=True, dtype=dtype)
    trainer, plan = sft(tiny_llava_dir, tmp_path, model_args, bf16=dtype == "bfloat16")
    assert plan == pytest.approx(peak_of(trainer), rel=0.15)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_reward_model_needs_what_is_planned(tiny_llava_dir, tmp_path, share_prefix):
    model_args, rows = fields_for(tiny_llava_dir), 2
    args = LlavaRewardConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=rows,
        max_steps=2,
        use_cpu=True,
        share_prefix=share_prefix,
        gradient_checkpointing=False,
        **QUIET,
    )
    model = load_score_model(str(tiny_llava_dir), model_args)
    columns = {
        "prompt": [question()] * 4,
        "chosen": [answer(20 - i % 2) for i in range(4)],
        "rejected": [answer(15)] * 4,
    }
    trainer = LlavaRewardTrainer(
        model=model,
        args=args,
        train_dataset=with_pictures(**columns),
        processing_class=AutoProcessor.from_pretrained(tiny_llava_dir),
        peft_config=lora_config(model_args, model, task="SEQ_CLS"),
    )
    length, shared = longest(trainer), None
    if share_prefix:  # the length of a pack: as long as one of two equal answers that share 16 tokens (or 17)
        shared = 16 + length % 2
        length = (length + shared) // 2
    plan = planned("reward", args, model_args, length, shared_length=shared)
    assert plan == pytest.approx(peak_of(trainer), rel=0.05)


def test_ppo_needs_what_is_planned(tiny_llava_dir, tmp_path, monkeypatch):
    # In inference mode the trace would not see what attention allocates.
    monkeypatch.setattr(ppo_trainer, "is_deepspeed_zero3_enabled", lambda: True)
    adapter = tiny_trainers.make_adapter(tiny_llava_dir, tmp_path / "adapter")
    rows = with_pictures(prompt=[question(30 - i) for i in range(4)], captions=[["a"]] * 4)
    trainer = tiny_trainers.ppo_trainer(
        tiny_llava_dir,
        adapter,
        tmp_path / "run",
        train_dataset=rows,
        response_length=48,
        total_episodes=8,
        local_rollout_forward_batch_size=4,
    )
    measured = phases_of(trainer)
    values = values_of(trainer.args) | {"sft_model_path": str(adapter), "value_init": "policy", "share_base": False}
    job = Job("ppo", values, fields_for(tiny_llava_dir, use_peft=False), Processes(), 1, longest(trainer))
    plan = {moment.phase: moment.total for moment in moments(job, Settings(2, 2, False, False, 4))}
    assert plan["update"] == pytest.approx(measured["update"], rel=0.15)
    assert plan["generation"] == pytest.approx(measured["generation"], rel=0.15)
    assert plan["passes"] == pytest.approx(measured["forward"], rel=0.15)
    assert max(plan.values()) == pytest.approx(max(measured.values()), rel=0.15)


def phases_of(trainer: Any) -> Counter[str]:
    """The peak of each phase of PPO."""
    peaks: Counter[str] = Counter()
    with MemoryTrace() as trace:
        trace.hold([*trainer.model.parameters(), *trainer.model.buffers()], "weights")
        phase = trainer.clock.phase

        @contextmanager
        def measured(name: str) -> Any:
            trace.restart()
            with phase(name):
                yield
            peaks[name] = max(peaks[name], trace.peak)

        trainer.clock.phase = measured
        trainer.train()
    return peaks


def test_weights_are_those_of_the_loaded_model(tiny_llava_dir):
    model_args = fields_for(tiny_llava_dir, lora_r=8)
    config = AutoConfig.from_pretrained(tiny_llava_dir)
    dry = add_adapter(build_policy(config, model_args), model_args, task="CAUSAL_LM")
    model, peft_config = load_policy_start(model_args)
    real = add_adapter(model, model_args, task="CAUSAL_LM", trained=peft_config)
    assert weights(dry) == weights(real)
    assert weights(dry)["adapters"] == 4 * sum(p.numel() for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize(("nested", "scales"), [(False, 4 * 64), (True, 64 + 4)])
def test_4_bits_are_half_a_byte_and_a_scale_for_64_numbers(nested, scales):
    model_args = LlavaModelConfig(load_in_4bit=True, use_bnb_nested_quant=nested, dtype="bfloat16")
    layer = QuantizedLinear(torch.nn.Linear(64, 64, bias=False, device="meta"), model_args)
    assert weights(layer)["base"] == 64 * 64 // 2 + scales


def test_the_formulae_of_states_gradients_and_cache(tiny_llava_dir):
    numbers = [torch.nn.Parameter(torch.zeros(10)), torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))]
    assert optimizer_states(numbers, "adamw_torch_fused") == 2 * 50
    assert optimizer_states(numbers, "adamw_bnb_8bit") == 2 * 15
    assert gradients(numbers, Processes()) == 50
    assert gradients(numbers, Processes(4)) == 100  # and DDP's buckets
    config = AutoConfig.from_pretrained(tiny_llava_dir)
    assert kv_cache(config, rows=3, length=10, bytes_per_number=2) == 2 * (2 + 1) * 2 * 8 * 3 * 10 * 2
    with pytest.raises(InputError, match="optim is 'lomo'"):
        optimizer_states(numbers, "lomo")


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, (8, 8, 8, 8)), (1, (8, 8, 2, 8)), (2, (8, 2, 2, 8)), (3, (2, 2, 2, 8))]
)
def test_zero_shares_out_by_stage(stage, expected):
    parts = Counter(base=8, gradients=8, optimizer=8, activations=8)
    shared = share(parts, Processes(4, stage))
    assert tuple(shared[name] for name in ("base", "gradients", "optimizer", "activations")) == expected


def recipe(folder: Path, name: str = "sft.yaml", **changes: Any) -> str:
    lines = {
        "dataset_name": "rows.json",
        "output_dir": str(folder / "out"),
        "max_length": 120,
        "per_device_train_batch_size": 4,
        "bf16": False,
        "dtype": "float32",
        **changes,
    }
    path = folder / name
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items() if value is not None))
    return str(path)


def test_settings_that_fit_are_found_without_running_each(tiny_llava_dir, tmp_path):
    path = recipe(tmp_path, model_name_or_path=str(tiny_llava_dir))
    job, settings = read_job(*_make_parser().parse_known_args(["--gpu-memory", "1", "--config", path]))
    limit = max(moment.total for moment in moments(job, Settings(2, 2, True, False)))
    plan = make_plan(job, settings, limit)
    rows = {choice.checkpointing: choice.rows for choice, _ in plan.fitting}
    assert rows[True] == 2
    assert plan.worst.total > limit
    for choice, need in plan.fitting:
        assert choice.rows * choice.accumulation == 4
        assert need == pytest.approx(max(moment.total for moment in moments(job, choice)), rel=0.02)


def test_the_command_prints_and_writes_its_plan(tiny_llava_dir, tmp_path, capsys):
    path, report = recipe(tmp_path, model_name_or_path=str(tiny_llava_dir)), tmp_path / "plan.json"
    words = ["plan", "--config", path, "--reserve", "0", "--per_device_train_batch_size", "1", "--json", str(report)]
    assert main([*words, "--gpu-memory", "1"]) == 0
    found = json.loads(report.read_text())
    assert found["fits"] and found["settings"] == asdict(Settings(1, 1, True, False))
    assert found["total"] == max(phase["total"] for phase in found["phases"].values())
    assert main([*words, "--gpu-memory", "0.0000001"]) == 1
    printed = capsys.readouterr().out
    assert "fits in 1 GiB" in printed and "Nothing fits. Least is" in printed


@pytest.mark.parametrize(
    ("name", "changes", "options", "expected"),
    [
        ("sft.yaml", {}, [], "model_name_or_path: cannot load 'not/here'"),
        ("sft.yaml", {"max_length": None}, [], "`max_length` is not set"),
        ("grpo.yaml", {}, [], "a plan can be made for sft, reward, ppo"),
        ("ppo.yaml", {"max_length": None, "sft_model_path": "not/yet"}, ["--length", "9"], "give its base model"),
        ("sft.yaml", {"optimiser": "adam"}, [], "optimiser"),
    ],
)
def test_what_cannot_be_planned_is_named(tmp_path, capsys, name, changes, options, expected):
    path = recipe(tmp_path, name, **{"model_name_or_path": "not/here", **changes})
    words = ["plan", "--gpu-memory", "1", "--config", path, *options]
    # `max_length` is SFT's default where the recipe leaves it out.
    words += ["--max_length", "null"] if changes.get("max_length", 1) is None and name == "sft.yaml" else []
    assert main(words) in (1, 2)
    assert expected in capsys.readouterr().err


@pytest.mark.gpu
def test_sft_on_a_gpu_needs_what_is_planned(tiny_llava_dir, tmp_path):
    trainer, plan = sft(tiny_llava_dir, tmp_path, fields_for(tiny_llava_dir), use_cpu=False)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert plan == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
