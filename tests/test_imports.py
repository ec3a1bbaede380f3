"""Imports run one way, so that a run can be followed from top to bottom; read with `ast`, nothing is executed."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_llava"
LAYERS = (
    ("cli",),
    ("demo", "rows.check_data", "plan.command", "hub.push_later"),
    ("recipe_stage",),
    ("train_sft", "train_reward", "train_ppo", "train_grpo", "train_rloo", "train_dpo"),
    # what the entry points share
    (
        "rows.check_report",
        "hub.card_samples",
        "console",
        "online_rl",
        "processes.launch_config",
        "plan.job",
        "plan.micro_batches",
        "plan.ppo",
        "plan.processes",
        "plan.report",
        "plan.roles",
        "plan.stages",
        "plan.starts",
        "loading.policy_start",
        "ppo.roles",
        "loading.reward_loading",
        "loading.score_start",
        "rows.splits",
        "stage_run",
    ),
    ("sft_trainer", "reward_trainer", "ppo_trainer", "factual_reward"),
    (
        *(
            "ppo.answers",
            "rollout",
            "ppo.passes",
            "forward.image_features",
            "forward.chunked_head",
            "ppo.micro_batches",
            "forward.shared_prefix",
            "forward.row_by_row",
            "loading.gpu_kernels",
            "ppo.generation",
            "ppo.growing_cache",
            "ppo.ended_rows",
            "ppo.generation_batches",
            "ppo.ask",
            "ppo.setup",
            "ppo.update",
            "ppo.report",
            "ppo.data",
            "ppo.checkpoint",
            "ppo.resume",
            "ppo.scoring",
            "ppo.health",
            "forward.finite_steps",
            "processes.blank_picture",
            "processes.fsdp_layers",
            "processes.shared_weights",
            "loading.reward_settings",
        ),
        *(
            "collators",
            "batches.dpo_collator",
            "batches.pairs",
            "batches.encoding",
            "rows.lengths",
            "rows.trl_rows",
            "rows.single_images",
        ),
        *(
            "plan.dry_models",
            "plan.dry_passes",
            "plan.dry_steps",
            "plan.memory_model",
            "plan.sharing",
            "models",
            "batches.chat_templates",
            "hub.lookup",
            "loading.sequence_classification",
            "adapters",
            "loading.adapter_switching",
            "loading.same_tokenizer",
            "loading.adapter_role",
            "loading.shared_base",
            "loading.dense_weights",
            "vllm_rollouts.engine",
            "vllm_rollouts.prompts",
            "vllm_rollouts.source",
            "loading.loaded_models",
            "loading.quantization",
        ),
        *("data", "rows.sources", "rows.maker", "rows.check", "rows.formats", "rows.captions"),
        *("convert_checkpoint", "convert.model", "convert.adapter", "convert.layouts", "convert.paper_tokenizer"),
        *("convert.merge", "checkpoints.whole_folder"),
        *(
            "checkpoints.safe_checkpoints",
            "checkpoints.deepspeed_files",
            "checkpoints.generation_buffer",
            "checkpoints.folders",
            "checkpoints.finished_model",
            "checkpoints.manifest",
            "checkpoints.loop_state",
            "checkpoints.full_weights",
        ),
        *(
            "hub.trainer",
            "hub.saves",
            "hub.push",
            "hub.repository",
            "hub.shareable",
            "hub.model_card",
            "hub.card_plots",
        ),
        *("output_dir", "processes.counts", "recipe", "recipe_values"),
        *(
            "checkpoints.stop_signals",
            "processes.worker_signals",
            "processes.pass_on_signals",
            "checkpoints.resume_command",
            "checkpoints.disk_full",
        ),
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
            "rows.contract",
        ),
        *(
            "rows.images",
            "rows.asked",
            "batches.plain_text",
            "batches.padding",
            "ppo.randomness",
            "errors",
            "plan.memory_trace",
            "loading.base_model",
            "hub.names",
        ),
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


def layer(module: str) -> str:
    """The name under which a module stands in LAYERS: its own, or that of its folder."""
    folder, _, name = module.rpartition(".")
    return module if module in LAYER else folder if folder in LAYER else name


def test_every_module_has_a_layer() -> None:
    found = {layer(name) for name in modules()}
    assert found <= set(LAYER), f"give {sorted(found - set(LAYER))} a place in LAYERS"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_downwards(module: str) -> None:
    upwards = {name for name in own_imports(modules()[module]) if LAYER[layer(name)] < LAYER[layer(module)]}
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
