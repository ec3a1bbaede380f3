"""The plan of memory: held against the bytes that real steps of the trainers hold on the CPU, at toy size.

Measured is the peak of live storage, as `MemoryTrace` counts it, over two real steps. Rows differ in length, so that
there are padding masks, as in any real batch; the longest is the plan's.
"""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import QUIET, answer, fields_for, longest, peak_of, planned, question, with_pictures
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from trl_llava.cli import main
from trl_llava.configs.reward import LlavaRewardConfig
from trl_llava.configs.sft import LlavaSFTConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError, RecipeError
from trl_llava.models.adapters import lora_config
from trl_llava.models.load import load_processor
from trl_llava.models.starts import load_policy_start, load_score_model
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.sft_trainer import LlavaSFTTrainer
from trl_llava.tools.plan.command import make_parser, make_plan, need_of, read_job
from trl_llava.tools.plan.dry_models import QuantizedLinear, add_adapter, build_policy
from trl_llava.tools.plan.formulas import (
    cast_as_deepspeed,
    gathered,
    gradients_at_the_step,
    gradients_backwards,
    gradients_between_steps,
    kv_cache,
    optimizer_states,
    weights,
)
from trl_llava.tools.plan.job import Job, Moment, Need, Settings
from trl_llava.tools.plan.memory_trace import MemoryTrace
from trl_llava.tools.plan.no_memory import NoMemory
from trl_llava.tools.plan.processes import Processes, ZeroSizes, find_processes

DEEPSPEED = {"distributed_type": "DEEPSPEED"}


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
        processing_class=load_processor(str(base)),
        peft_config=peft_config,
    )
    return trainer, planned("sft", args, model_args, longest(trainer))


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
        trace.part = "logits"
        second = torch.zeros(4)
        trace.part = "activations"
        trace.hold([first], "weights")
        trace.restart()
        third = torch.zeros(1)
    assert trace.at_peak == {"weights": 32, "logits": 16, "activations": 4}
    assert (second.shape, third.shape) == ((4,), (1,))


def test_without_memory_whole_numbers_are_real_and_floats_have_a_shape():
    layer, without_memory = torch.nn.Linear(4, 3, device="meta"), NoMemory()
    without_memory.take(layer)
    with without_memory, MemoryTrace() as trace:
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        scores = layer(torch.zeros(2, 4))
        chosen = scores.argmax(-1)
        loss = (scores * mask).sum()
        loss.backward()
        read = loss.item()
    assert mask.sum(1).tolist() == [2, 1]
    assert (chosen.tolist(), read) == ([1, 1], 1.0)
    assert (type(scores).__name__, scores.shape, layer.weight.grad.shape) == ("FakeTensor", (2, 3), (3, 4))
    assert trace.live["activations"] >= scores.nbytes + chosen.nbytes + mask.nbytes


EVERY_OTHER = {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": False}, EVERY_OTHER, {"loss_type": "nll"}])
def test_sft_needs_what_is_planned(tiny_llava_dir, tmp_path, changes):
    trainer, plan = sft(tiny_llava_dir, tmp_path, fields_for(tiny_llava_dir), **changes)
    assert plan == pytest.approx(peak_of(trainer), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "internvl", "smolvlm", "idefics3", "pixtral", "gemma3", "paligemma2"]
)
def test_sft_of_any_family_needs_no_more_than_is_planned(family_folder, tmp_path, family):
    # The plan is for the largest images that fit; those of the rows are small.
    base = family_folder(family)
    trainer, plan = sft(base, tmp_path, fields_for(base))
    assert peak_of(trainer) < 1.03 * plan


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


@pytest.mark.slow
def test_8_bit_sft_needs_what_is_planned(tiny_llava_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    model_args = fields_for(tiny_llava_dir, load_in_8bit=True, dtype="bfloat16")
    trainer, plan = sft(tiny_llava_dir, tmp_path, model_args, bf16=True)
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
        judging_prompt=None,
        peft_config=lora_config(model_args, model, task="SEQ_CLS"),
    )
    length, shared = longest(trainer), None
    if share_prefix:  # the length of a pack: as long as one of two equal answers that share 16 tokens (or 17)
        shared = 16 + length % 2
        length = (length + shared) // 2
    plan = planned("reward", args, model_args, length, shared_length=shared)
    assert plan == pytest.approx(peak_of(trainer), rel=0.05)


def test_weights_are_those_of_the_loaded_model(tiny_llava_dir):
    model_args = fields_for(tiny_llava_dir, lora_r=8)
    config = AutoConfig.from_pretrained(tiny_llava_dir)
    dry = add_adapter(build_policy(config, model_args), model_args, task="CAUSAL_LM")
    model, peft_config = load_policy_start(model_args)
    real = add_adapter(model, model_args, task="CAUSAL_LM", trained=peft_config)
    assert weights(dry) == weights(real)
    assert weights(dry)["adapters"] == 4 * sum(p.numel() for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_counted_once(tiny_llava_onevision_dir, tied):
    config = AutoConfig.from_pretrained(tiny_llava_onevision_dir)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    dry = build_policy(config, LlavaModelConfig())
    real = AutoModelForImageTextToText.from_config(config)
    assert (real.lm_head.weight is real.get_input_embeddings().weight) == tied
    assert sum(p.numel() for p in dry.parameters()) == real.num_parameters()


@pytest.mark.parametrize(("nested", "scales"), [(False, 4 * 64), (True, 64 + 4)])
def test_4_bits_are_half_a_byte_and_a_scale_for_64_numbers(nested, scales):
    model_args = LlavaModelConfig(load_in_4bit=True, use_bnb_nested_quant=nested, dtype="bfloat16")
    layer = QuantizedLinear(torch.nn.Linear(64, 64, bias=False, device="meta"), model_args)
    assert weights(layer)["base"] == 64 * 64 // 2 + scales


def test_the_formulae_of_states_gradients_and_cache(tiny_llava_dir):
    numbers = [torch.nn.Parameter(torch.zeros(10)), torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))]
    assert optimizer_states(numbers, "adamw_torch_fused") == 2 * 50
    assert optimizer_states(numbers, "adamw_bnb_8bit") == 2 * 15
    assert gradients_at_the_step(numbers, Processes()) == 50
    assert gradients_at_the_step(numbers, Processes(4)) == 100  # and DDP's buckets
    config = AutoConfig.from_pretrained(tiny_llava_dir)
    assert kv_cache(config, rows=3, length=10, number=2) == 2 * (2 + 1) * 2 * 8 * 3 * 10 * 2
    with pytest.raises(InputError, match="optim is 'lomo'"):
        optimizer_states(numbers, "lomo")


FORMULAE = ("weights", "optimizer", "all the time", "backwards", "step", "gathered")


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (Processes(4, 0), (4040, 8080, 0, 4040, 8080, 0)),
        (Processes(4, 1), (4040, 3032, 0, 200, 6064, 0)),
        (Processes(4, 2), (4040, 3032, 0, 2224, 4048, 0)),
        (Processes(4, 3), (1052, 3032, 1212, 0, 1012, 2400)),
        (Processes(4, 3, fsdp=True), (1012, 2020, 0, 0, 1010, 0)),
    ],
    ids=["ddp", "zero1", "zero2", "zero3", "fsdp"],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_what_each_of_four_processes_holds(processes, expected, bf16):
    """A weight of 1000 numbers and one of 10, which ZeRO-3 keeps whole: a share is 253 numbers."""
    layer = torch.nn.Linear(100, 10)
    numbers = list(layer.parameters())
    processes = replace(processes, sizes=ZeroSizes(reduce_bucket=50, persistent=10, live=600))
    if bf16:
        cast_as_deepspeed([layer], processes, bf16)
        in_bf16 = {1: (2020, 3032, 0, 100, 4044, 0), 2: (2020, 3032, 0, 1112, 3036, 0)}
        in_bf16[3] = (526, 3032, 606, 0, 1518, 1200)
        expected = in_bf16.get(processes.zero_stage, expected) if processes.deepspeed else expected
    found = (
        weights(layer, processes)["base"],
        optimizer_states(numbers, "adamw_torch_fused", processes),
        gradients_between_steps(numbers, processes),
        gradients_backwards(numbers, processes, accumulated=True),
        gradients_at_the_step(numbers, processes),
        gathered([layer], processes),
    )
    assert dict(zip(FORMULAE, found, strict=True)) == dict(zip(FORMULAE, expected, strict=True))


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
    job, settings = read_job(*make_parser().parse_known_args(["--gpu-memory", "1", "--config", path]))
    job = replace(job, limit=need_of(job, Settings(2, 2, True, False)).worst.total)
    plan = make_plan(job, settings, need_of(job, settings))
    rows = {choice.checkpointing: choice.rows for choice, _ in plan.fitting}
    assert rows[True] == 2
    assert plan.own.worst.total > job.limit and not plan.fits
    for choice, need in plan.fitting:
        assert choice.rows * choice.accumulation == 4
        assert need == need_of(job, choice).worst.total <= job.limit


def test_a_micro_batch_is_not_advised_by_two_smaller_ones_alone(tiny_llava_dir, tmp_path, monkeypatch):
    """Four rows and eight have another worst moment than one and two: 11, 12, 16 and 30 bytes; 18 were expected."""
    path = recipe(tmp_path, model_name_or_path=str(tiny_llava_dir), per_device_train_batch_size=8)
    job, settings = read_job(*make_parser().parse_known_args(["--gpu-memory", "1", "--config", path]))

    def need(job: Job, settings: Settings) -> Need:
        rows = settings.rows
        return Need([Moment("passes", Counter(activations=10 + max(rows, 3 * rows - 6 + 2 * (rows > 4))))])

    monkeypatch.setattr("trl_llava.tools.plan.command.need_of", need)
    plan = make_plan(replace(job, limit=22), settings, need(job, settings))
    assert [(choice.rows, choice.accumulation, total) for choice, total in plan.fitting[:2]] == [(4, 2, 16)] * 2


def test_the_command_prints_and_writes_its_plan(tiny_llava_dir, tmp_path, capsys):
    path, report = recipe(tmp_path, model_name_or_path=str(tiny_llava_dir)), tmp_path / "plan.json"
    words = ["plan", "--config", path, "--reserve", "0", "--per_device_train_batch_size", "1", "--json", str(report)]
    assert main([*words, "--gpu-memory", "1"]) == 0
    found = json.loads(report.read_text())
    assert found["fits"] and found["settings"] == asdict(Settings(1, 1, True, False))
    assert found["total"] == max(phase["total"] for phase in found["phases"].values())
    assert main([*words, "--gpu-memory", "0.0000001"]) == 1
    printed = capsys.readouterr().out
    assert "It fits: " in printed and "Nothing fits. Least is" in printed


@pytest.mark.parametrize(
    ("name", "changes", "options", "expected"),
    [
        ("sft.yaml", {}, [], "model_name_or_path: cannot load 'not/here'"),
        ("sft.yaml", {"max_length": None}, [], "`max_length` is not set"),
        ("grpo.yaml", {}, [], "a plan can be made for sft, reward, ppo"),
        ("ppo.yaml", {"max_length": None, "sft_model_path": "not/yet"}, ["--length", "9"], "give its base model"),
        ("sft.yaml", {}, ["--gpu-memory", "-3"], "--gpu-memory must be above 0 (GiB), found -3"),
        ("sft.yaml", {}, ["--gpu-memory", "nan"], "--gpu-memory must be above 0"),
        ("sft.yaml", {}, ["--gpu-memory", "many"], "command line: argument --gpu-memory/--gpu_memory: invalid float"),
        ("sft.yaml", {}, ["--reserve", "1"], "--reserve must be 0 or more and below --gpu-memory (1), found 1"),
        ("sft.yaml", {}, ["--length", "0"], "--length must be at least 1, found 0"),
        ("sft.yaml", {}, ["--images_per_row", "-1"], "--images_per_row must be 0 or more"),
        ("sft.yaml", {}, ["--num_processes", "0"], "--num_processes must be at least 1"),
        ("sft.yaml", {}, ["--json", "no/such/folder/plan.json"], "there is no folder no/such/folder"),
        ("sft.yaml", {}, ["--accelerate_config", "zero2"], "give --num_processes, one for each GPU"),
        ("sft.yaml", {}, ["--accelerate_config", "zero9"], "neither a file nor one of"),
        ("sft.yaml", {}, ["--gpu_memry", "3"], "gpu_memry"),
        ("sft.yaml", {"optimiser": "adam"}, [], "optimiser"),
    ],
)
def test_what_cannot_be_planned_is_named(tmp_path, capsys, name, changes, options, expected):
    path = recipe(tmp_path, name, **{"model_name_or_path": "not/here", **changes})
    words = ["plan", "--gpu-memory", "1", "--reserve", "0", "--config", path, *options]
    # `max_length` is SFT's default where the recipe leaves it out.
    words += ["--max_length", "null"] if changes.get("max_length", 1) is None and name == "sft.yaml" else []
    assert main(words) in (1, 2)
    assert expected in capsys.readouterr().err


def test_another_stages_recipe_says_what_it_will_write(tiny_llava_dir, tmp_path):
    common = {"model_name_or_path": str(tiny_llava_dir), "use_peft": True}
    recipe(tmp_path, output_dir="runs/sft", lora_r=4, **common)
    recipe(tmp_path, "reward_a.yaml", output_dir="runs/reward", lora_r=2, max_length=333, **common)
    changes = {"max_length": None, "max_prompt_length": 60, "response_length": 8, "num_mini_batches": 1}
    path = recipe(
        tmp_path,
        "ppo.yaml",
        sft_model_path="runs/sft",
        reward_model_path="runs/reward/checkpoint-200",
        gradient_checkpointing=False,
        **changes,
    )
    job, settings = read_job(*make_parser().parse_known_args(["--gpu-memory", "1", "--config", path]))
    need = need_of(job, settings)
    assert [note.split(":")[1].split(",")[0] for note in need.notes[:2]] == [
        f" planned for an adapter of lora_r {rank} on {tiny_llava_dir}" for rank in (4, 2)
    ]
    assert any("reads 333 tokens a row" in note for note in need.notes)
    adapters = {moment.parts["adapters"] for moment in need.moments}
    # Policy and its frozen copy of rank 4, value and reward of rank 2: 2 * 4 + 2 * 2 ranks of fp32 numbers.
    fresh = add_adapter(
        build_policy(AutoConfig.from_pretrained(tiny_llava_dir), job.model_args),
        fields_for(tiny_llava_dir, lora_r=1),
        task="CAUSAL_LM",
    )
    assert adapters == {(2 * 4 + 2 * 2) * weights(fresh)["adapters"]}


def test_a_revision_is_looked_up_in_the_cache_and_no_one_is_asked(tiny_llava_dir, tmp_path, monkeypatch):
    folder = tmp_path / "models--me--llava"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "v1").write_text("a" * 40)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / ("a" * 40)).symlink_to(tiny_llava_dir)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("trl_llava.hub.lookup.snapshot_download", None)
    path = recipe(tmp_path, model_name_or_path="me/llava@v1", max_length=40)
    job, settings = read_job(*make_parser().parse_known_args(["--gpu-memory", "1", "--config", path]))
    here = recipe(tmp_path, model_name_or_path=str(tiny_llava_dir), max_length=40)
    same, _ = read_job(*make_parser().parse_known_args(["--gpu-memory", "1", "--config", here]))
    assert need_of(job, settings).totals == need_of(same, settings).totals
    ppo = {"max_length": None, "max_prompt_length": 30, "value_init": "policy", "num_mini_batches": 1}
    path = recipe(tmp_path, "ppo.yaml", sft_model_path="me/llava@v1", **ppo)
    job, _ = read_job(*make_parser().parse_known_args(["--gpu-memory", "1", "--config", path]))
    assert (job.args.sft_model_path, job.args.sft_model_revision) == ("me/llava", "v1")


@pytest.mark.parametrize(
    ("lines", "count", "expected"),
    [
        ({"distributed_type": "MULTI_GPU", "num_processes": 4}, None, Processes(4, 0)),
        ({"distributed_type": "FSDP", "num_processes": -1}, 2, Processes(2, 3, fsdp=True)),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}, "num_processes": 8},
            3,
            Processes(3, 2),
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}},
            2,
            Processes(2, 1),
        ),
    ],
)
def test_a_launch_configuration_says_how_a_run_is_shared_out(tmp_path, monkeypatch, lines, count, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "launch.yaml").write_text(json.dumps(lines))
    assert find_processes("launch.yaml", count) == expected


def test_sizes_of_deepspeed_are_read_and_auto_is_of_the_models_width(tmp_path):
    own = tmp_path / "ds.json"
    zero = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "overlap_comm": True,
    }
    own.write_text(json.dumps({"zero_optimization": {**zero, "stage3_max_live_parameters": 1e6}}))
    launch = {**DEEPSPEED, "deepspeed_config": {"deepspeed_config_file": str(own)}}
    (tmp_path / "launch.yaml").write_text(json.dumps(launch))
    sizes = find_processes(str(tmp_path / "launch.yaml"), 2).for_width(32).sizes
    assert sizes == ZeroSizes(reduce_bucket=1024, persistent=320, live=1_000_000, overlap=True)
    own.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    with pytest.raises(RecipeError, match=r"ds\.json offloads"):
        find_processes(str(tmp_path / "launch.yaml"), 2)


@pytest.mark.parametrize(
    "text", ["a: [", "just words", json.dumps({**DEEPSPEED, "deepspeed_config": {"deepspeed_config_file": "no.json"}})]
)
def test_a_launch_configuration_that_says_nothing_is_named(tmp_path, text):
    (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"launch\.yaml"):
        find_processes(str(tmp_path / "launch.yaml"), 2)
