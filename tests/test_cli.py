"""The `trl-llava` command: what goes to the launcher, what to the stage, and what is said when neither knows it."""

import argparse
import doctest
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from transformers import TrainerState

from trl_llava import cli
from trl_llava.configs.recipe import FIELD_GROUPS, STAGES, make_parser
from trl_llava.errors import RecipeError
from trl_llava.models.load import load_processor
from trl_llava.ppo import terminal

ROOT = Path(__file__).parents[1]
FIELDS = frozenset({"learning_rate", "bf16", "freeze_projector", "debug"})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "bf16": False, "use_cpu": True}))
    return path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """What would have been launched."""
    ran: list[argparse.Namespace] = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", ran.append)
    return ran


def test_arguments_are_told_apart() -> None:
    words = ["--config", "a.yaml", "--num_processes", "2", "--learning_rate", "1", "--no_freeze_projector"]
    words += ["--main-process-port=1", "--debug", "x", "--accelerate_config", "cpu"]
    launch, training = cli.split_arguments(words, FIELDS, launch_command_parser())
    assert launch == ["--num_processes", "2", "--main-process-port=1", "--accelerate_config", "cpu"]
    # `debug` is an option of both: it is the recipe's, as for `trl`.
    assert training == ["--config", "a.yaml", "--learning_rate", "1", "--no_freeze_projector", "--debug", "x"]


def test_unknown_option_is_named() -> None:
    with pytest.raises(RecipeError, match=r"unknown option `--learnin_rate`; did you mean `--learning_rate`\?"):
        cli.split_arguments(["--learnin_rate", "1"], FIELDS, launch_command_parser())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_launched_as_a_module(stage: str, recipe: Path, launched: list[argparse.Namespace]) -> None:
    assert cli.main([stage, "--config", str(recipe), "--seed", "3"]) == 0
    (args,) = launched
    assert (args.module, args.training_script) == (True, f"trl_llava.train_{stage}")
    assert args.training_script_args == ["--config", str(recipe), "--seed", "3"]
    assert (args.num_machines, args.mixed_precision, args.dynamo_backend) == (1, "no", "no")
    assert args.num_processes >= 1


@pytest.mark.parametrize("given", ["zero2", str(ROOT / "accelerate_configs" / "zero2.yaml")])
def test_accelerate_config_by_name_and_by_file(given: str, recipe: Path, launched: list[argparse.Namespace]) -> None:
    assert cli.main(["sft", "--config", str(recipe), "--accelerate_config", given, "--num_processes", "2"]) == 0
    (args,) = launched
    assert Path(args.config_file).samefile(ROOT / "accelerate_configs" / "zero2.yaml")
    assert args.num_processes == 2


def test_as_many_processes_start_as_asked_for(
    recipe: Path, launched: list[argparse.Namespace], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none"))
    for count in (1, 2):
        assert cli.main(["sft", "--config", str(recipe), "--num_processes", str(count)]) == 0
    assert [options.multi_gpu for options in launched] == [False, True]
    for name in ("cpu", "single_gpu"):
        assert cli.main(["sft", "--config", str(recipe), "--num_processes", "2", "--accelerate_config", name]) == 2
        assert f"{name}.yaml is for one process" in capsys.readouterr().err
    assert len(launched) == 2


def test_accelerate_config_that_is_not_there(
    recipe: Path,
    launched: list[argparse.Namespace],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["sft", "--config", str(recipe), "--accelerate_config", "zero9"]) == 2
    assert "neither a file nor one of cpu, ddp, fsdp2, multi_node, single_gpu, zero2, zero3" in capsys.readouterr().err
    assert not launched


def test_a_bad_recipe_is_not_launched(
    recipe: Path, launched: list[argparse.Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text("learning_rte: 1\n")
    assert cli.main(["sft", "--config", str(recipe)]) == 2
    assert capsys.readouterr().err == f"error: {recipe}: unknown key `learning_rte`; did you mean `learning_rate`?\n"
    assert not launched


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr("trl_llava.tools.convert.merge_command.merge", fail)
    with pytest.raises(ValueError, match="a fault"):
        cli.main(["merge", "adapter", "target"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_launched_stage_that_fails_says_why_without_a_traceback(
    processes: int, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    (tmp_path / "rows.json").write_text('[{"prompt": [], "completion": []}]')
    config = "ddp" if processes > 1 else "cpu"  # without GPUs, `ddp` starts processes that talk through gloo
    words = ["--dataset_name", str(tmp_path / "rows.json"), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    words += ["--bf16", "false", "--model_name_or_path", str(tiny_llama_dir)]
    command = [sys.executable, "-m", "trl_llava.cli", "sft", "--accelerate_config", config]
    result = subprocess.run(
        [*command, "--num_processes", str(processes), *words], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 1
    assert "is a text-only model. Choose an image-text model" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["score", "--help"]])
def test_help_ends_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(
        name in out for name in (("--reward_model", "--caption") if "score" in words else (*cli.STAGES, "demo"))
    )


def test_help_of_a_stage_is_what_it_does_and_what_recipes_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ppo", "-h"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Stage 3: PPO with the factual reward") and "Out: `output_dir`" in out
    assert "  --kl_coef VALUE       Weight of the KL penalty against the reference." in out
    assert "(default: 0.05)" in out and "--accelerate_config NAME" in out and "more keys: --help-all" in out
    assert "--cudnn_attention" not in out and "--no_" not in out and len(out.splitlines()) < 300


def test_all_keys_of_a_stage_and_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ppo", "--help-all"]) == 0
    out = capsys.readouterr().out
    assert "usage: trl-llava ppo --config recipe.yaml [--field value ...]" in out
    own, trl, transformers = (out.index(f"{title}:") for title in FIELD_GROUPS.values())
    assert out.index("Every field below") < own < out.index("--correctness_coef CORR") < trl < transformers
    assert trl < out.index("--dataset_train_split DATASET") < transformers < out.index("--save_steps SAVE")
    assert "one of cpu, ddp, fsdp2, multi_node, single_gpu, zero2, zero3" in out
    assert "The same as `--share_base false`." in out


def test_help_into_a_pipe_that_closes_has_no_traceback() -> None:
    command = f"{sys.executable} -m trl_llava.cli sft --help-all | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.startswith("Stage 1:") and done.stderr == ""


@pytest.mark.parametrize(
    ("word", "meant"), [("evn", "env"), ("rewards", "reward"), ("train_ppo", "ppo"), ("check_data", "check-data")]
)
def test_a_misspelt_command_is_met_with_the_nearest(word: str, meant: str, capsys: Any) -> None:
    assert cli.main([word, "--config", "x.yaml"]) == 2
    assert capsys.readouterr().err == f"error: there is no command `{word}`; did you mean `{meant}`?\n"


def test_a_recipe_of_another_stage_is_called_that(tmp_path: Path, capsys: Any) -> None:
    for name, text in (("ppo.yaml", "kl_coef: 0.1\nlerning_rate: 1\n"), ("mine.yaml", "kl_coef: 0.1\nvf_coef: 1.0\n")):
        (tmp_path / name).write_text(text)
        assert cli.main(["sft", "--config", str(tmp_path / name)]) == 2
        assert "this is a recipe for ppo, not for sft, which has no field `kl_coef`" in capsys.readouterr().err


def test_several_trackers_fit_on_the_command_line(recipe: Path, launched: list[argparse.Namespace]) -> None:
    assert cli.main(["sft", "--config", str(recipe), "--report_to", "wandb", "tensorboard", "--seed", "1"]) == 0
    values = make_parser("sft").check(launched[0].training_script_args).values
    assert values["report_to"] == ["wandb", "tensorboard"]
    assert make_parser("sft").check(["--config", str(recipe), "--report_to", "none"]).values["report_to"] == "none"


def test_four_bits_without_an_adapter_are_refused(recipe: Path, capsys: Any) -> None:
    assert cli.main(["sft", "--config", str(recipe), "--load_in_4bit"]) == 2
    assert "`load_in_4bit` needs an adapter" in capsys.readouterr().err
    make_parser("sft").check(["--config", str(recipe), "--load_in_4bit", "--use_peft"])


def test_env_reports_also_where_torch_is_broken(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-m", "trl_llava.cli", "env"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "torch cannot be imported: OSError: libcudart.so.12: cannot open shared object file" in done.stdout
    assert "transformers: " in done.stdout and "HF_TOKEN=(set)" in done.stdout and "hf_secret" not in done.stdout
    whole = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "torch is built " in whole and "trl_llava: " in whole


def test_assemble_makes_a_llava(tmp_path: Path, tiny_llava_dir: Path, tiny_llama_dir: Path, capsys: Any) -> None:
    words = ["assemble", "--tower", str(tiny_llava_dir), "--language_model"]
    assert cli.main([*words, str(tiny_llama_dir), str(tmp_path / "made")]) == 0
    assert "--freeze_projector false" in capsys.readouterr().out
    processor = load_processor(str(tmp_path / "made"))
    assert processor.patch_size == 7 and "USER" in processor.chat_template
    assert cli.main([*words, str(tmp_path / "gone"), str(tmp_path / "other")]) == 1
    assert "--language_model: cannot load" in capsys.readouterr().err


def test_a_launch_option_that_cannot_be_read_is_one_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "--config", str(recipe), "--num_processes", "two"]) == 2
    error = "error: command line: argument --num_processes/--num-processes: invalid int value: 'two'.\n"
    assert capsys.readouterr().err == error


def test_score_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score", "--reward_model", str(tmp_path), "--image", str(tmp_path / "no.png"), "--question", "?"]
    assert cli.main([*words, "--answer", "!"]) == 1
    assert capsys.readouterr().err == f"error: --image: the image file {tmp_path / 'no.png'} does not exist.\n"


def test_a_stage_without_anything_asks_for_its_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft"]) == 2
    assert "give a recipe: `trl-llava sft --config recipe.yaml`" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_missed_at_once() -> None:
    code = "import sys; from trl_llava.cli import main; s = main(sys.argv[1:]); print(s, 'torch' in sys.modules)"
    words = ["ppo", "--config", "gone.yaml"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "error: cannot read the recipe gone.yaml: No such file or directory.\n"
    assert done.stdout == "2 False\n"


def test_the_line_of_a_ppo_step_is_short() -> None:
    assert doctest.testmod(terminal).failed == 0
    state = TrainerState(global_step=3, max_steps=18)
    logs = {"objective/scores": 0.25, "objective/kl": 1.5, "completions/mean_length": 31.75, "policy/entropy_avg": 6.2}
    assert terminal.line_of(logs, state) == "step 3/18: score 0.25, KL 1.5, tokens 31.8"
