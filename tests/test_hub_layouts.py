"""Each layout of the Hub through `trl-llava check-data`, and through two steps of the stages that read it."""

from pathlib import Path

import hub_layouts
import pytest

from trl_llava import cli

FAST = [
    *("--use_peft", "--lora_r", "2", "--use_cpu", "--bf16", "false", "--max_steps", "2", "--disable_tqdm"),
    *("--report_to", "none", "--save_strategy", "no", "--per_device_train_batch_size", "1"),
]


def words(stage: str, base: Path, rows: Path, out: Path) -> list[str]:
    own = ["--with_captions", "false"] if stage == "reward" else []
    return ["--model_name_or_path", str(base), "--dataset_name", str(rows), "--output_dir", str(out), *own]


@pytest.mark.parametrize("name", hub_layouts.NAMES)
def test_check_data(name: str, tiny_llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = hub_layouts.write(name, tmp_path)
    checked = words("reward", tiny_llava_dir, rows, tmp_path / "out")
    assert cli.main(["check-data", "--stage", "reward", *checked, "--dataset_num_proc", "1", "--samples", "1"]) == 0
    printed = capsys.readouterr().out
    assert hub_layouts.CHOSEN in printed and hub_layouts.REJECTED not in printed  # the chosen one is shown
    assert "<image>*" in printed and printed.rstrip().endswith("ok: all rows that a run would use can be used")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("name", hub_layouts.NAMES)
def test_two_steps(stage: str, name: str, tiny_llava_dir: Path, tmp_path: Path) -> None:
    rows = hub_layouts.write(name, tmp_path)
    assert not cli.main([stage, *words(stage, tiny_llava_dir, rows, tmp_path / "out"), *FAST])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
