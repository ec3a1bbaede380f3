"""The parser: every key known, every value of its type, and a resolved recipe that repeats the run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_llava.configs.recipe import RecipeDumper, RecipeLoader, make_parser
from trl_llava.errors import RecipeError

CPU = {"output_dir": "unused", "bf16": False, "use_cpu": True}


def write(folder: Path, name: str = "recipe.yaml", **values: Any) -> Path:
    path = folder / name
    path.write_text(yaml.dump({**CPU, **values}, Dumper=RecipeDumper))
    return path


def parse(folder: Path, *args: str, stage: str = "ppo", **values: Any) -> tuple[Any, ...]:
    return make_parser(stage).parse(["--config", str(write(folder, **values)), *args])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1.0}, r"recipe.yaml: unknown key `learning_rte`; did you mean `learning_rate`\?"),
        ({"xyzzy": 1}, r"recipe.yaml: unknown key `xyzzy`\."),
        ({"num_processes": 2}, "`num_processes` belongs to the launcher; give it as --num_processes"),
        ({"learning_rate": "fast"}, r"recipe.yaml: `learning_rate`: expected float, found 'fast' \(str\)"),
        ({"num_ppo_epochs": 1.5}, r"`num_ppo_epochs`: expected int, found 1.5 \(float\)"),
        ({"num_ppo_epochs": True}, r"`num_ppo_epochs`: expected int, found True \(bool\)"),
        ({"bf16": "yes"}, r"`bf16`: expected bool or null, found 'yes' \(str\)"),
        ({"clamp_kl": 1}, "`clamp_kl`: expected bool, found 1"),
        ({"run_name": 7}, r"`run_name`: expected str or null, found 7 \(int\)"),
        ({"learning_rate": None}, r"`learning_rate`: expected float, found None"),
        ({"kl_estimator": "k2"}, "`kl_estimator`: expected one of 'k1', 'k3', found 'k2'"),
        ({"lr_scheduler_type": "cosin"}, "`lr_scheduler_type`: expected one of 'linear', 'cosine'"),
        ({"dtype": "bf16"}, "`dtype`: expected one of 'auto', 'bfloat16', 'float16', 'float32' or null, found 'bf16'"),
        ({"reward_weights": ["a"]}, r"`reward_weights`: expected list\[float\] or null, found"),
        ({"datasets": [{"path": "a", "spilt": "b"}]}, "DatasetConfig.*'spilt'"),
        ({"datasets": [{"split": "b"}]}, "DatasetConfig.* missing 1 required .* 'path'"),
        ({"num_mini_batches": 3}, "recipe.yaml: `num_mini_batches` .3. must divide `per_device_train_batch_size`"),
        ({"env": ["A"]}, "`env` must be a mapping"),
    ],
)
def test_bad_value_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(tmp_path, **values)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learnin_rate", "3"], r"command line: unknown argument `--learnin_rate`; did you mean `learning_rate`\?"),
        (["--learn", "3"], "command line: unknown argument `--learn`"),  # no abbreviations
        (["--learning_rate", "fast"], "argument --learning_rate.*invalid float value: 'fast'"),
        (["stray"], "unknown argument `stray`"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "cannot read the recipe nowhere.yaml: No such file"),
    ],
)
def test_bad_command_line_is_named(args: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_parser("ppo").parse(args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nkl_coef: 2\nseed: 3\n", "key `seed` is on line 1 and again on line 3"),
        ("- a\n- b\n", "expected a mapping `key: value`, found list"),
        ("", "expected a mapping `key: value`, found NoneType"),
        ("a: [1\n", "recipe.yaml: while parsing"),
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        make_parser("ppo").parse(["--config", str(tmp_path / "recipe.yaml")])


def test_yaml_as_people_write_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "output_dir: x\nbf16: no\nuse_cpu: yes\neval_strategy: no\nlearning_rate: 1e-4\nkl_coef: 1\n"
        "lora_target_modules: all-linear\nlr_scheduler_kwargs: {min_lr: 1e-6}\n"
    )
    _, args, model_args, _, recipe = make_parser("ppo").parse(["--config", str(tmp_path / "recipe.yaml")])
    assert (args.bf16, args.use_cpu, args.eval_strategy, args.learning_rate) == (False, True, "no", 1e-4)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert model_args.lora_target_modules == "all-linear"
    assert recipe.given["kl_coef"] == 1.0


def test_command_line_overrides_and_unsets(tmp_path: Path) -> None:
    _, args, model_args, *_ = parse(
        tmp_path, "--length_coef", "null", "--seed=5", "--no_freeze_projector", "--disable_tqdm", length_coef=-10.0
    )
    assert (args.length_coef, args.seed, args.disable_tqdm) == (None, 5, True)
    assert model_args.freeze_projector is False


def test_env_is_set_as_in_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_LLAVA_TEST", "before")
    *_, recipe = parse(tmp_path, env={"TRL_LLAVA_TEST": 3})
    assert os.environ["TRL_LLAVA_TEST"] == "3"
    assert "env" not in recipe.values


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_resolved_recipe_repeats_the_run(tmp_path: Path, stage: str) -> None:
    first = parse(
        tmp_path,
        "--num_train_epochs",
        "2",
        stage=stage,
        learning_rate=1e-5,
        run_name="1e-4",
        lora_target_modules=["q_proj", "v_proj"],
        datasets=[{"path": "a", "fraction": 0.5}],
        warmup_steps=0.03,
    )
    (tmp_path / "resolved.yaml").write_text(first[-1].to_yaml())
    second = make_parser(stage).parse(["--config", str(tmp_path / "resolved.yaml")])
    assert second[-1].values == first[-1].values
    for one, other in zip(first[:-1], second[:-1], strict=True):
        assert {**vars(one), "distributed_state": 0} == {**vars(other), "distributed_state": 0}
    assert (second[1].learning_rate, second[1].num_train_epochs, second[1].run_name) == (1e-5, 2.0, "1e-4")


def test_token_is_used_but_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "old")
    _, args, *_, recipe = parse(
        tmp_path, "--hub_token", "hf_secret", stage="sft", lr_scheduler_kwargs={"token": "hf_secret", "a": 1}
    )
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert args.hub_token is None  # the trainer pickles its arguments
    assert "hf_secret" not in recipe.to_yaml()
    assert recipe.values["lr_scheduler_kwargs"] == {"a": 1}


def test_number_like_text_survives_the_dialect() -> None:
    value = {"text": "1e-4", "number": 1e-4, "whole": 3, "flag": "no"}
    assert yaml.load(yaml.dump(value, Dumper=RecipeDumper), Loader=RecipeLoader) == value


@pytest.mark.parametrize(
    ("stage", "values", "right"),
    [
        ("sft", {"kl_coef": 0.1, "learning_rate": 1e-5}, "ppo"),
        ("ppo", {"with_captions": False}, "reward"),
        ("dpo", {"reward_model_path": "runs/reward"}, "ppo or grpo or rloo"),
    ],
)
def test_a_recipe_of_another_stage_is_named(tmp_path: Path, stage: str, values: dict[str, Any], right: str) -> None:
    field = next(iter(values))
    with pytest.raises(RecipeError, match=f"recipe for {right}, not for {stage}, which has no field `{field}`"):
        parse(tmp_path, stage=stage, **values)


def test_a_stage_needs_no_upstream_of_another(tmp_path: Path) -> None:
    """TRL takes trainers out: those of the other stages go on, also where they say what a recipe is for."""
    recipe = write(tmp_path, with_captions=False)
    code = (
        "import sys\n"
        "sys.modules['trl_llava.configs.ppo'] = sys.modules['trl_llava.configs.rloo'] = None\n"
        "from trl_llava.configs.recipe import make_parser\n"
        f"make_parser('sft').parse(['--config', {str(recipe)!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "this is a recipe for reward, not for sft" in result.stderr


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"label_smoothing_factor": 0.1, "loss_type": "chunked_nll"}, "`label_smoothing_factor` must stay 0 with"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs `lr_scheduler_kwargs: {min_lr: ...}`"),
        ({"save_strategy": "best"}, "`save_strategy: best` needs `metric_for_best_model`"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}, "is 'accuracy', but evaluation gives"),
        ({"eval_on_start": True}, "`eval_on_start` needs evaluation rows"),
        ({"dataloader_persistent_workers": True}, "`dataloader_persistent_workers` needs `dataloader_num_workers`"),
        ({"max_grad_norm": -1}, "`max_grad_norm` must not be negative, found -1.0"),  # each gradient turned round
        ({"lora_alpha": 0}, "`lora_alpha` must be above 0, found 0"),  # an adapter without effect
        ({"adam_beta1": 2}, "`adam_beta1` must be from 0 to 1, found 2.0"),
        ({"seed": -1}, "`seed` must be from 0 to 2**32 - 1, found -1"),
        ({"optim_args": "fast"}, "`optim_args` must be like `name=value,name=value`, found 'fast'"),
        ({"lr_scheduler_kwargs": "fast"}, "`lr_scheduler_kwargs` must be a mapping, found 'fast'"),
        ({"model_init_kwargs": '{"dtype": "float32"}'}, "`model_init_kwargs` is not read: set `dtype`"),
        ({"captions_file": ""}, "`captions_file` is an empty text: leave it out"),
        ({"dataloader_multiprocessing_context": "spawn"}, "needs `dataloader_num_workers` above 0"),
    ],
)
def test_combinations_of_upstreams_fields_that_cannot_work(fields, problem):
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    with pytest.raises(RecipeError, match=re.escape(problem)):
        make_parser("sft").check(["--output_dir", "x", "--bf16", "false", *words])


@pytest.mark.parametrize(
    "fields",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-6}'},
        {"save_strategy": "best", "metric_for_best_model": "eval_loss"},
        {"eval_on_start": True, "test_split_size": 1},
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 2},
    ],
)
def test_the_same_fields_with_what_they_need(fields):
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    make_parser("sft").check(["--output_dir", "x", "--bf16", "false", *words])


def test_a_home_directory_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: ~/llava\noutput_dir: ~/run\n")
    words = ["--config", "~/recipe.yaml", "--image_folder=~/", "--bf16=false", "--use_cpu"]
    script_args, args, model_args, _, _ = make_parser("sft").parse(words)
    assert (model_args.model_name_or_path, args.output_dir) == (f"{tmp_path}/llava", f"{tmp_path}/run")
    assert script_args.image_folder == f"{tmp_path}/"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"accelerator_config": {"nonsense": 1}}, "`accelerator_config: {'nonsense': 1}` cannot be used ("),
        ({"accelerator_config": "no.json"}, "`accelerator_config: 'no.json'` cannot be used ("),
        ({"ddp_backend": "gloo"}, "`ddp_backend: 'gloo'` cannot be used (Default process group"),
        ({"pad_to_multiple_of": "eight"}, "`pad_to_multiple_of: 'eight'` cannot be used ("),
    ],
)
def test_a_field_that_upstream_does_not_name_is_found(tmp_path, fields, problem):
    with pytest.raises(RecipeError, match=re.escape(problem)) as caught:
        make_parser("sft").parse(["--config", str(write(tmp_path, use_cpu=True, bf16=False, **fields))])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(RecipeError, match=r"photo\.png is no recipe: it is not text in UTF-8"):
        make_parser("sft").check(["--config", str(tmp_path / "photo.png")])
