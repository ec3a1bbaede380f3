"""Every YAML file in the project that is a recipe or a launch configuration goes through the parser that reads it."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from trl_llava.configs.recipe import STAGES, make_parser

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "recipes", ROOT / "trl_llava" / "demo")
RECIPES = sorted(path for folder in FOLDERS for path in folder.rglob("*.yaml"))


def stage_of(path: Path) -> str:
    """The stage is the first word of the file's name: `ppo.yaml`, `reward_plain.yaml`."""
    return path.stem.split("_")[0]


def test_all_recipes_are_found() -> None:
    models = {"llava-rlhf-7b-v1.5-224", "llava-rlhf-13b-v1.5-336", "llava-1.5-7b-hf", "llava-onevision-0.5b"}
    models |= {"qwen2.5-vl-3b", "smolvlm-500m"}
    assert {path.name for path in (ROOT / "recipes").iterdir()} == models
    found = {(path.parent.name, path.stem) for path in RECIPES}
    for model in models:
        without = {"llava-rlhf-7b-v1.5-224": {"reward"}}  # README.md says why
        assert {(model, stage) for stage in set(STAGES) - without.get(model, set())} <= found
    assert {stage_of(path) for path in RECIPES} == set(STAGES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_goes_through_the_real_parser(path: Path) -> None:
    # A recipe for GPUs is for bf16, which this machine may not have; that is all that is changed.
    *_, recipe = make_parser(stage_of(path)).parse(["--config", str(path), "--bf16", "false", "--use_cpu"])
    assert recipe.given["output_dir"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_head_says_what_it_needs(path: Path) -> None:
    head = path.read_text().split("\n\n")[0]
    for word in ("Hardware:", "Needs first:", "Command:", "Override:", "Differs from the paper:"):
        assert word in head
    assert f"--config {path.relative_to(ROOT)}" in head


def test_ppo_recipe_is_the_papers() -> None:
    _, args, *_ = make_parser("ppo").parse(
        ["--config", str(ROOT / "recipes/llava-1.5-7b-hf/ppo.yaml"), "--bf16", "false", "--use_cpu"]
    )
    gpus, rollouts = 8, args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert gpus * rollouts == 512
    assert gpus * rollouts // args.num_mini_batches == 256
    assert (args.kl_coef, args.gamma, args.lam, args.temperature, args.learning_rate) == (0.1, 1.0, 1.0, 1.0, 3e-5)
    assert (args.missing_eos_penalty, args.length_coef, args.correctness_coef) == (8.0, -10.0, 2.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cpu", DistributedType.NO),
        ("single_gpu", DistributedType.NO),
        ("ddp", DistributedType.MULTI_GPU),
        ("zero2", DistributedType.DEEPSPEED),
        ("zero3", DistributedType.DEEPSPEED),
        ("fsdp2", DistributedType.FSDP),
        ("multi_node", DistributedType.MULTI_GPU),
    ],
)
def test_accelerate_reads_its_configs(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert config.num_processes == 16 if name == "multi_node" else config.num_processes in (1, -1)


def test_accelerate_configs_say_their_stage() -> None:
    for stage in (2, 3):
        config = load_config_from_file(str(ROOT / "accelerate_configs" / f"zero{stage}.yaml"))
        assert config.deepspeed_config["zero_stage"] == stage
    assert load_config_from_file(str(ROOT / "accelerate_configs" / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
    assert load_config_from_file(str(ROOT / "accelerate_configs" / "cpu.yaml")).use_cpu is True
