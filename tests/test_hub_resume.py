"""A run goes on from a checkpoint that comes from the Hub, on another machine; a pickle in one is not run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import pytest
import tiny_trainers
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from test_hub_runs import QUICK, write_rows
from test_hub_safety import Evil

from trl_llava import train_ppo, train_sft
from trl_llava.run.manifest import DamagedCheckpointError, write_manifest

TIMED = ("runtime", "per_second", "time/", "eps", "tokens_per_second")


def numbers(trainer: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if not any(name in key for name in TIMED)}
        for entry in trainer.state.log_history
    ]


def sft(base: Path, folder: Path) -> Callable[..., Any]:
    words = ["--model_name_or_path", str(base), "--use_peft", "--lora_r", "2", "--lora_dropout", "0.3"]
    words += ["--max_steps", "3", "--dataset_name", f"{folder}/sft.json"]
    return lambda *more: train_sft.main([*QUICK, *words, *more])


def ppo(base: Path, folder: Path) -> Callable[..., Any]:
    words = ["--sft_model_path", str(tiny_trainers.make_adapter(base, folder / "adapter"))]
    words += ["--reward_funcs", "tiny_trainers:even_tokens", "--value_init", "policy"]
    words += ["--total_episodes", "6", "--response_length", "4", "--stop_token", "eos", "--num_ppo_epochs", "1"]
    words += ["--num_sample_generations", "0", "--dataset_name", f"{folder}/ppo.json"]
    return lambda *more: train_ppo.main([*QUICK, *words, *more])


@pytest.mark.parametrize("stage", [sft, ppo])
def test_on_another_machine(hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path: Path, stage: Any) -> None:
    folder = write_rows(tmp_path)
    main = stage(tiny_llava_dir, folder)
    push = ["--push_to_hub", "--hub_model_id", "tiny", "--hub_strategy", "checkpoint", "--hub_always_push"]
    save = ["--save_strategy", "steps", "--save_steps", "1", "--card_samples", "0"]
    whole = main("--output_dir", f"{folder}/run", *save, *push)
    shutil.copytree(folder / "run", folder / "kept")
    shutil.rmtree(folder / "run")
    there = Path(snapshot_download("tester/tiny", revision="checkpoint-2")) / "last-checkpoint"
    resumed = main("--output_dir", f"{folder}/other", "--resume_from_checkpoint", str(there), *save)
    assert numbers(resumed) == numbers(whole) and resumed.state.global_step == 3
    for path in (path for path in (folder / "kept").rglob("*.safetensors") if "checkpoint-" not in str(path)):
        before, after = load_file(path), load_file(folder / "other" / path.relative_to(folder / "kept"))
        assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("stage", [sft, ppo])
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"])
def test_a_pickle_in_a_checkpoint_is_not_run(
    saved: dict[Any, Path],
    tiny_llava_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: Any,
    file: str,
) -> None:
    folder = write_rows(tmp_path)
    there = shutil.copytree(saved[stage], folder / "last-checkpoint")
    torch.save(Evil(), there / file)
    if file == "adapter_model.bin":
        (there / "adapter_model.safetensors").unlink()
    write_manifest(there)  # whoever makes such a file can hash it, too
    main = stage(tiny_llava_dir, folder)
    with pytest.raises(
        DamagedCheckpointError, match=r"last-checkpoint .*more than numbers, it would call \S*print\. Nothing of it"
    ):
        main("--output_dir", f"{folder}/run", "--resume_from_checkpoint", str(there))
    told = capsys.readouterr()
    assert "PICKLE LOADED" not in told.out + told.err


@pytest.fixture(scope="module")
def saved(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """A checkpoint of each stage."""
    found = {}
    for stage in (sft, ppo):
        folder = write_rows(tmp_path_factory.mktemp("saved"))
        save = ["--output_dir", f"{folder}/run", "--save_strategy", "steps", "--save_steps", "2"]
        stage(tiny_llava_dir, folder)(*save)
        found[stage] = folder / "run" / "checkpoint-2"
    return found
