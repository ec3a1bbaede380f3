"""A training step of the reward model: loss and gradients are the paper's code's, on its converted checkpoint."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import golden_data
import pytest
import torch
from golden_data import MODEL, expanded
from test_formulae import bare_trainer

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapters import load_adapter
from trl_llava.models.load import load_sequence_classifier
from trl_llava.tools.convert.convert_checkpoint import convert

OUT = golden_data.tensors("4_outputs.safetensors")
NORMS = golden_data.read("4_meta.json")["rm_train.grad_norms"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The set's reward model, trainable."""
    folder = tmp_path_factory.mktemp("converted")
    base = golden_data.convert_base(folder)
    convert(str(next(MODEL.glob("rm/checkpoint-*"))), folder / "rm", base=str(base))
    classifier = load_sequence_classifier(str(base), LlavaModelConfig())
    return load_adapter(classifier, str(folder / "rm"), is_trainable=True)


def our_name(name: str) -> str:
    """What one of the original's parameters is called in ours."""
    if name.startswith("reward_head."):
        return f"base_model.model.score.modules_to_save.default.{name.removeprefix('reward_head.')}"
    name = name.removeprefix("backbone_model.").replace(".lora_default.", ".default.")
    return name.replace("model.model.layers.", "model.model.language_model.layers.")


def batch(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Chosen rows, then rejected ones, each picture once, as our collator stacks them."""
    slots = (model.config.image_token_id, model.config.image_seq_length)
    pad = golden_data.read("3_truncate.json")["pad"]
    input_ids, attention_mask = expanded(ids, (ids != pad).long(), *slots)
    pictures = {"pixel_values": OUT["pixel_values"][: len(ids) // 2], "image_copies": 2}
    return {"input_ids": input_ids, "attention_mask": attention_mask, **pictures}


def test_a_step_of_the_reward_model(model: Any) -> None:
    pairs = OUT["rm_train.input_ids"]
    trainer = bare_trainer(model)
    trainer.args = SimpleNamespace(reward_centering="paper", center_rewards_coefficient=None)
    matches = 0
    # The set does not say which candidate of each pair was preferred; one choice must give its loss.
    for choice in product((0, 1), repeat=len(pairs)):
        chosen = [pair[side] for pair, side in zip(pairs, choice, strict=True)]
        rejected = [pair[1 - side] for pair, side in zip(pairs, choice, strict=True)]
        model.zero_grad()
        loss = trainer.compute_loss(model, batch(model, torch.stack([*chosen, *rejected])))
        if abs(loss.item() - OUT["rm_train.loss"].item()) > 1e-4:
            continue
        matches += 1
        loss.backward()
        check_gradients(dict(model.named_parameters()))
    assert matches == 1


def check_gradients(parameters: dict[str, torch.nn.Parameter]) -> None:
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert {our_name(name) for name in NORMS} == trained
    for name, norm in NORMS.items():
        assert parameters[our_name(name)].grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name
    for part in ("weight", "bias"):
        found = parameters[our_name(f"reward_head.{part}")].grad
        torch.testing.assert_close(found, OUT[f"rm_train.grad_reward_head_{part}"], atol=1e-4, rtol=1e-4)
