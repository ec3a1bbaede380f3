"""What two launched processes hold, against the plan: DDP, ZeRO-1, -2 and -3, in fp32 and in bf16, at toy size."""

import json
from pathlib import Path
from typing import Any

import pytest
from stage_runs import BACKENDS, launch, run_words, write_config, write_rows

from trl_llava.cli import main

# As DeepSpeed's defaults are to a real model: weights of some sizes are small, a bucket and what is gathered a part.
SIZES = {
    "reduce_bucket_size": 20_000,
    "stage3_param_persistence_threshold": 600,
    "stage3_max_live_parameters": 40_000,
    "stage3_max_reuse_distance": 40_000,
    "stage3_prefetch_bucket_size": 2_000,
}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def backend(folder: Path, zero_stage: int) -> dict[str, Any]:
    """A launch configuration's part; DeepSpeed's in a file of its own, where sizes can be given."""
    if not zero_stage:
        return BACKENDS["ddp"]
    file = folder / "deepspeed.json"
    settings = dict.fromkeys(AUTO, "auto") | {"bf16": {"enabled": "auto"}, "zero_allow_untested_optimizer": True}
    file.write_text(json.dumps({**settings, "zero_optimization": {"stage": zero_stage, **SIZES}}))
    deepspeed = {"deepspeed_config_file": str(file), "zero3_init_flag": zero_stage == 3}
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "accumulation", "zero_stage"),
    [
        *(("sft", 2, zero_stage) for zero_stage in (0, 1, 2, 3)),
        *(("sft", 1, zero_stage) for zero_stage in (1, 2, 3)),
        # Not DDP: a process of it aborted under the trace ("terminate called without an active exception").
        *(("reward", 2, zero_stage) for zero_stage in (2, 3)),
    ],
)
def test_each_process_holds_what_is_planned(
    tiny_llava_dir: Path, tmp_path: Path, stage: str, accumulation: int, zero_stage: int, bf16: bool
) -> None:
    write_rows(tmp_path)
    more = ["--save_strategy", "no", "--eval_strategy", "no", "--lora_r", "64", "--gradient_checkpointing", "false"]
    more += ["--bf16", str(bf16).lower(), "--dtype", "bfloat16" if bf16 else "float32"]
    more += ["--gradient_accumulation_steps", str(accumulation)]
    more += ["--share_prefix", "false"] if stage == "reward" else []  # on a CPU packs run otherwise than planned
    words = run_words(tmp_path, tiny_llava_dir, tmp_path, stage, 2, *more)
    (tmp_path / "plan.json").write_text(json.dumps([(stage, words)]))
    own = backend(tmp_path, zero_stage)
    given = {"mixed_precision": None} if zero_stage else {}  # the recipe says it
    status, errors = launch(tmp_path, own, 2, "launched_memory.py", str(tmp_path / "plan.json"), **given)
    assert status == 0, errors[-5000:]
    found = [json.loads((tmp_path / stage / f"memory_{process}.json").read_text()) for process in (0, 1)]
    config = write_config(tmp_path, own, 2, **given)
    own_words = ["--stage", stage, "--accelerate_config", str(config), "--gpu-memory", "1", "--reserve", "0"]
    own_words += ["--length", str(max(measured.pop("length") for measured in found))]
    assert main(["plan", *words, *own_words, "--json", str(tmp_path / "planned.json")]) == 0
    phases = json.loads((tmp_path / "planned.json").read_text())["phases"]
    passes, step = phases["forward and backward"], phases["optimizer step"]
    planned = {
        "weights": passes["base"] + passes["adapters"] + passes.get("heads", 0),
        "optimizer": passes["optimizer"],
        "passes": passes["total"],
        "step": step["total"],
    }
    most = {name: max(measured[name] for measured in found) for name in planned}  # the longest row is on one of them
    assert planned == pytest.approx(most, rel=0.15)
