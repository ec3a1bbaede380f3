"""Imports run one way, so that a run can be followed from top to bottom; read with `ast`, nothing is executed."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_llava"
LAYERS = (
    ("cli",),
    ("demo", "check_data", "plan", "push"),
    ("train_sft", "train_reward", "train_ppo", "train_grpo", "train_rloo", "train_dpo"),
    # what the entry points share
    (
        "check_report",
        "card_samples",
        "console",
        "online_rl",
        "launch_config",
        "plan_ppo",
        "plan_processes",
        "plan_report",
        "plan_roles",
        "plan_stages",
        "plan_starts",
        "policy_start",
        "ppo_roles",
        "reward_loading",
        "score_start",
        "splits",
        "stage_run",
    ),
    ("sft_trainer", "reward_trainer", "ppo_trainer", "factual_reward"),
    (
        *(
            "answers",
            "rollout",
            "passes",
            "image_features",
            "chunked_head",
            "micro_batches",
            "shared_prefix",
            "row_by_row",
            "gpu_kernels",
            "generation",
            "growing_cache",
            "generation_batches",
            "ppo_ask",
            "ppo_setup",
            "ppo_update",
            "ppo_report",
            "ppo_data",
            "ppo_checkpoint",
            "ppo_resume",
            "scoring",
            "health",
            "finite_steps",
            "blank_picture",
            "fsdp_layers",
            "shared_weights",
            "reward_settings",
        ),
        *("collators", "dpo_collator", "pairs", "encoding", "lengths", "trl_rows", "single_images"),
        *(
            "dry_models",
            "dry_passes",
            "memory_model",
            "models",
            "hub",
            "sequence_classification",
            "adapters",
            "adapter_switching",
            "same_tokenizer",
            "adapter_role",
            "shared_base",
            "dense_weights",
            "vllm_engine",
            "vllm_prompts",
            "vllm_rollouts",
            "loaded_models",
            "quantization",
        ),
        *("data", "sources", "row_maker", "row_check", "row_formats", "captions"),
        *("convert_checkpoint", "convert_model", "convert_adapter", "checkpoint_layouts", "paper_tokenizer"),
        *("merge", "whole_folder"),
        *(
            "safe_checkpoints",
            "generation_buffer",
            "checkpoint_folders",
            "finished_model",
            "manifest",
            "loop_state",
            "full_weights",
        ),
        *("hub_trainer", "hub_saves", "hub_push", "hub_repository", "shareable", "model_card", "card_plots"),
        *("output_dir", "process_counts", "recipe", "recipe_values"),
        *("stop_signals", "worker_signals", "pass_on_signals", "resume_command", "disk_full"),
    ),
    (
        *(
            "configs",
            "configs_beyond_ppo",
            "configs_ppo",
            "configs_vllm",
            "prompts",
            "ppo_math",
            "reward_terms",
            "vision_tower",
            "rows",
        ),
        *("images", "plain_text", "padding", "randomness", "errors", "chat_templates", "memory_trace", "hub_names"),
    ),
    ("__init__",),
)
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `trl_llava.`."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def own_imports(path: Path) -> set[str]:
    known = modules()
    names = {name.removeprefix("trl_llava.") for name in imported(path) if name.startswith("trl_llava.")}
    return {name for name in names if name in known}


def top(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_layer() -> None:
    found = {top(name) for name in modules()}
    assert found <= set(LAYER), f"give {sorted(found - set(LAYER))} a place in LAYERS"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_downwards(module: str) -> None:
    upwards = {name for name in own_imports(modules()[module]) if LAYER[top(name)] < LAYER[top(module)]}
    assert not upwards


def test_no_cycles() -> None:
    graph = {name: own_imports(path) for name, path in modules().items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_trainers_do_not_know_each_other() -> None:
    trainers = {"sft_trainer", "reward_trainer", "ppo_trainer"}
    for name in trainers:
        assert not own_imports(modules()[name]) & (trainers - {name})


def test_ppo_trainer_takes_any_reward() -> None:
    assert "factual_reward" not in own_imports(modules()["ppo_trainer"])


def test_only_the_ppo_trainer_is_tied_to_trls_ppo() -> None:
    users = {
        name: {used for used in imported(path) if used.startswith("trl.experimental")}
        for name, path in modules().items()
    }
    users = {name: used for name, used in users.items() if used}
    # configs_ppo.py subclasses PPOConfig: the one exception.
    assert set(users) == {"ppo_trainer", "configs_ppo"}
    assert users["configs_ppo"] == {"trl.experimental.ppo", "trl.experimental.ppo.PPOConfig"}
