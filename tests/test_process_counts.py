"""Which checkpoints another number of processes can resume from."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trl_llava.run.process_counts import ProcessCountError, check_processes

RECIPE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


def checkpoint(folder: Path, *, processes: int = 1, shards: int = 0, **state: Any) -> Path:
    """What a run with two rows per process and step leaves."""
    place = folder / "checkpoint-3"
    (place / "global_step3").mkdir(parents=True)
    (place / "trainer_state.json").write_text(json.dumps({"global_step": 3, **state}))
    for rank in range(processes if processes > 1 else 0):
        (place / f"rng_state_{rank}.pth").touch()
    for rank in range(shards):
        (place / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    if shards:
        (place / "latest").write_text("global_step3")
    return place


def arguments(rows: int, accumulation: int) -> Any:
    return SimpleNamespace(per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation)


def test_as_many_rows_a_step_on_fewer_processes(tmp_path: Path) -> None:
    place = checkpoint(tmp_path, processes=4)
    check_processes(place, arguments(2, 4), RECIPE)
    with pytest.raises(ProcessCountError, match=r"took 8 rows, and one of this run takes 4 .* is 8"):
        check_processes(place, arguments(2, 2), RECIPE)


def test_ppo_counts_its_completions(tmp_path: Path) -> None:
    place = checkpoint(tmp_path, episode=36)
    check_processes(place, arguments(3, 4), RECIPE)
    with pytest.raises(ProcessCountError, match="took 12 rows"):
        check_processes(place, arguments(1, 2), RECIPE)


def test_deepspeed_reads_only_its_own_number_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkpoint(tmp_path, processes=2, shards=2)
    with pytest.raises(ProcessCountError, match="under DeepSpeed with 2 processes, and this run is without DeepSpeed"):
        check_processes(place, arguments(1, 4), RECIPE)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ProcessCountError, match="DeepSpeed with 2 processes, and this run is under DeepSpeed with 1"):
        check_processes(place, arguments(1, 4), RECIPE)


def test_without_deepspeed_nothing_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ProcessCountError, match="without DeepSpeed or FSDP, and this run is under DeepSpeed with 1"):
        check_processes(checkpoint(tmp_path), arguments(1, 2), RECIPE)


def test_fsdp_keeps_its_optimizer_in_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkpoint(tmp_path, processes=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ProcessCountError, match="written without DeepSpeed or FSDP, and this run is under FSDP"):
        check_processes(place, arguments(1, 4), RECIPE)
    (place / "pytorch_model_fsdp.bin").touch()
    check_processes(place, arguments(1, 4), RECIPE)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(ProcessCountError, match="written under FSDP, and this run is without"):
        check_processes(place, arguments(1, 4), RECIPE)
