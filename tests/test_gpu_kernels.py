"""What a recipe asks of a GPU is refused without one; liger, played by a stub, is called for each base once."""

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_reward_trainer import make_trainer
from tiny_trainers import make_adapter, ppo_trainer
from transformers import AutoModelForImageTextToText, PreTrainedModel

from trl_llava import train_ppo, train_reward, train_sft
from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.reward import LlavaRewardConfig
from trl_llava.errors import InputError, MissingPackageError
from trl_llava.models import gpu_kernels
from trl_llava.models.gpu_kernels import apply_liger, check_gpu_kernels, check_liger_knows
from trl_llava.stage_run import begin

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def arguments(device: torch.device, liger: bool = True) -> Any:
    return SimpleNamespace(use_liger_kernel=liger, liger_kernel_config=None, device=device)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PreTrainedModel, dict[str, bool]]]:
    """A package of liger's name that lists what it is called with, and knows LLaVA-1.5 as liger does."""
    calls: list[tuple[PreTrainedModel, dict[str, bool]]] = []
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    package._apply_liger_kernel_to_instance = lambda model, **config: calls.append((model, config))
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": print, "llava": print}
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    for module in (gpu_kernels, sys.modules["transformers.integrations.liger"]):
        monkeypatch.setattr(module, "is_liger_kernel_available", lambda: True)
    return calls


def test_what_needs_a_gpu_is_refused_on_the_cpu() -> None:
    with pytest.raises(InputError, match=r"`use_liger_kernel: true` needs a GPU, and this run is on the CPU"):
        check_gpu_kernels(arguments(CPU), None)
    with pytest.raises(InputError, match=r"flex_attention` cannot train on the CPU.*Use sdpa"):
        check_gpu_kernels(arguments(CPU, liger=False), "flex_attention")
    with pytest.raises(InputError, match=r"flash_attention_2` needs a GPU, and this run is on the CPU: use sdpa"):
        check_gpu_kernels(arguments(CPU, liger=False), "flash_attention_2")
    with pytest.raises(InputError, match=r"`attn_implementation`: 'spda' is none of eager, .*sdpa"):
        check_gpu_kernels(arguments(CPU, liger=False), "spda")
    for attention in (None, "sdpa", "eager"):
        check_gpu_kernels(arguments(CPU, liger=False), attention)
    check_gpu_kernels(arguments(GPU, liger=False), "flex_attention")


@pytest.mark.parametrize("wanted", [True, False])
def test_cudnn_makes_no_attention_unless_the_recipe_says_so(wanted: bool, tmp_path: Path) -> None:
    words = ["--model_name_or_path", "x", "--dataset_name", "x", "--output_dir", str(tmp_path), "--use_cpu", "--bf16"]
    words += ["false", "--report_to", "none", *(["--cudnn_attention"] if wanted else [])]
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        begin("sft", words)
        assert torch.backends.cuda.cudnn_sdp_enabled() == wanted
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_liger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "is_liger_kernel_available", lambda: False)
    with pytest.raises(MissingPackageError, match=r"needs liger-kernel.*`pip install liger-kernel`"):
        check_gpu_kernels(arguments(GPU), None)


def test_backends_that_liger_misses_are_no_news(liger: list, caplog: pytest.LogCaptureFixture) -> None:
    check_gpu_kernels(arguments(GPU), None)
    log = logging.getLogger("liger_kernel.backends.registry")
    log.warning("Backend impl '%s' for op '%s' could not be imported: no module", "cute", "rms_norm")
    log.warning("a fault of its own")
    assert caplog.messages == ["a fault of its own"]


def test_a_family_that_liger_does_not_know_is_named(
    liger: list, tiny_llava_dir: Path, tiny_llava_next_dir: Path
) -> None:
    check_gpu_kernels(arguments(GPU), None)
    check_liger_knows(AutoModelForImageTextToText.from_pretrained(tiny_llava_dir), arguments(GPU))
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_next_dir)
    check_liger_knows(model, arguments(GPU, liger=False))
    with pytest.raises(InputError, match=r"no kernels for llava_next models \(LlavaNextFor.*knows llama, llava"):
        check_liger_knows(model, arguments(GPU))
    assert not liger


@pytest.mark.parametrize("config_class", [LlavaRewardConfig, LlavaPPOConfig])
def test_stages_with_a_head_of_their_own_keep_it(config_class: Any, tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        return config_class(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **changes)

    kept = config(use_liger_kernel=True, liger_kernel_config={"rope": False}).liger_kernel_config
    assert kept == {"rope": False, "fused_linear_cross_entropy": False, "cross_entropy": False}
    assert config().liger_kernel_config is None
    with pytest.raises(ValueError, match=r"`liger_kernel_config: \{fused_linear_cross_entropy: true\}`"):
        config(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


def test_ppo_applies_it_to_each_base_once(liger: list, tiny_llava_dir: Path, tmp_path: Path) -> None:
    trainer = ppo_trainer(
        tiny_llava_dir, make_adapter(tiny_llava_dir, tmp_path / "a"), tmp_path, use_liger_kernel=True
    )
    bases = [trainer.policy_model.get_base_model(), trainer.value_model.get_base_model()]
    assert [model for model, _ in liger] == bases
    assert all(config == {"fused_linear_cross_entropy": False, "cross_entropy": False} for _, config in liger)
    apply_liger([trainer.policy_model, trainer.policy_model], trainer.args)
    assert len(liger) == 3
    apply_liger([trainer.policy_model], arguments(CPU, liger=False))
    assert len(liger) == 3


def test_reward_training_leaves_the_score_head_alone(liger: list, tiny_llava_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llava_dir, tmp_path, use_liger_kernel=True, max_steps=1)
    trainer.train()
    (call,) = liger  # by transformers' trainer
    assert call[0] is trainer.model.get_base_model()
    assert call[1] == {"fused_linear_cross_entropy": False, "cross_entropy": False}


def test_an_entry_point_refuses_before_it_loads(tmp_path: Path) -> None:
    words = ["--dataset_name", "none", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false"]
    for stage, more in ((train_sft, []), (train_reward, []), (train_ppo, ["--sft_model_path", "none"])):
        with pytest.raises(InputError, match="needs a GPU"):
            stage.main([*words, "--model_name_or_path", "none", "--use_liger_kernel", "true", *more])
        for reporter in ("wandbb", "none_of_these"):
            with pytest.raises(InputError, match=f"`report_to`: '{reporter}' is none of .*wandb"):
                stage.main([*words, "--model_name_or_path", "none", "--report_to", reporter, *more])
        assert not (tmp_path / "out").exists()
