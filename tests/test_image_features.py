"""Image features are made once a step, and nobody can tell from the numbers or the gradients."""

from pathlib import Path
from typing import Any

import pytest
import test_entry_points
import torch
from reference_passes import response_logits
from test_entry_points import Work
from test_passes import make_inputs, policy_and_value
from test_share_base_runs import UNCLIPPED, logged, start
from test_shared_base import args_for, build_shared, save_adapters

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapter_switching import active_adapter
from trl_llava.models.adapters import load_adapter
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.image_features import encode_images, same_vision
from trl_llava.models.load import load_policy
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.shared_base import SharedBase
from trl_llava.ppo.passes import response_logprobs
from trl_llava.rewards.factual_reward import FactualReward

work, policy, reward_model = test_entry_points.work, test_entry_points.policy, test_entry_points.reward_model
FAMILIES = ["tiny_llava_dir", "tiny_llava_next_dir", "tiny_llava_onevision_dir"]


class Tower:
    """Counts the images that run through a tower."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.images = 0
        self.passes = 0
        self.handle = model.model.vision_tower.register_forward_pre_hook(self.count)

    def count(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...], *rest: Any) -> None:
        self.images += len(given[0])
        self.passes += 1


def flat(inputs: ModelInputs) -> list[torch.Tensor]:
    """The features of all images, row by row."""
    return [feature for row in inputs.features.rows for feature in row]


@pytest.mark.parametrize("family", FAMILIES)
def test_features_follow_their_rows_and_stand_in_the_place_of_pixels(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    model, _ = policy_and_value(family, folder)
    tower, inputs = Tower(model), make_inputs(family, folder)  # 1, 0, 2 and 1 images, all different
    found = encode_images(model, inputs, batch_size=2)
    assert tower.passes == 2 and [len(row) for row in found.features.rows] == [1, 0, 2, 1]
    assert not any(feature.requires_grad for feature in flat(found))
    assert "pixel_values" in inputs.images and not found.tokens and not found.images
    _, second, third, fourth = flat(found)
    picked = found.select([3, 1, 2]).repeated(2)
    for own, expected in zip(flat(picked), [fourth, fourth, second, third, second, third], strict=True):
        assert own is expected
    assert picked.image_kwargs()["mm_encoder_outputs"]["image"].pooler_output[2] is second
    assert found.select([1]).image_kwargs() == {}
    assert tower.passes == 2


def test_features_are_made_in_the_dtype_of_the_model_outside_of_autocast(tiny_llava_dir: Path) -> None:
    model, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_images(model, inputs, 8)
    assert {feature.dtype for feature in flat(found)} == {torch.float32}
    for ours, alone in zip(flat(found), flat(encode_images(model, inputs, 8)), strict=True):
        assert torch.equal(ours, alone)
    assert flat(encode_images(model.to(torch.bfloat16), inputs, 8))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_reward_model_scores_pixels_and_features_alike(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    model, inputs = policy_and_value(family, folder)[1].to(torch.bfloat16), make_inputs(family, folder)
    ids = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    with torch.no_grad():
        scores = [model(**ids, **given.image_kwargs()).logits for given in (inputs, encode_images(model, inputs, 8))]
    assert torch.equal(*scores) and scores[0].std() > 0.1


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_a_trained_tower_or_projector_runs_in_every_pass_and_gets_its_gradients(
    tiny_llava_dir: Path, part: str
) -> None:
    model, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    getattr(model.model, part).requires_grad_(True)
    assert encode_images(model, inputs, 8) is inputs
    responses, mask = torch.full((4, 3), 20), torch.ones(4, 3, dtype=torch.bool)
    logprobs, _ = response_logprobs(model, inputs, responses, mask, Sampling())
    logits = response_logits(model, inputs, responses, mask, temperature=1.0)
    expected = logits.log_softmax(-1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = [torch.autograd.grad(found.sum(), trained, allow_unused=True) for found in (logprobs, expected)]
    assert sum(grad is not None and bool(grad.abs().max() > 0) for grad in grads[0]) >= 2
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_roles_whose_adapters_hold_the_projector_make_features_of_their_own(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    part = ["multi_modal_projector"]
    adapters = save_adapters(tiny_llava_dir, tmp_path, policy=part, value=part)
    host, roles = build_shared(tiny_llava_dir, adapters, args_for(tiny_llava_dir))
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    assert encode_images(host, inputs, 8) is inputs and encode_images(roles["value"], inputs, 8) is inputs  # trained
    assert not same_vision(host, roles["value"]) and not same_vision(host, roles["reward"])
    of_reward = flat(encode_images(roles["reward"], inputs, 8))
    with active_adapter(host, "reference"):  # has the base's projector, as the reward model does
        assert same_vision(host, roles["reward"])
        of_reference = flat(encode_images(host, inputs, 8))
    assert all(torch.equal(a, b) for a, b in zip(of_reference, of_reward, strict=True))
    host.requires_grad_(False)
    for role in ("value", "policy"):
        found = flat(encode_images(roles["value"] if role == "value" else host, inputs, 8))
        with torch.no_grad(), active_adapter(host, "value_role" if role == "value" else "default"):
            pixels = inputs.image_tensors()["pixel_values"]
            expected = host.get_base_model().model.get_image_features(pixel_values=pixels, return_dict=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected.pooler_output, strict=True))
        assert not torch.equal(found[0], of_reward[0])


def test_roles_on_one_base_share_their_features(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapters = save_adapters(tiny_llava_dir, tmp_path)
    host, roles = build_shared(tiny_llava_dir, adapters, args_for(tiny_llava_dir))
    assert same_vision(host, roles["value"]) and same_vision(roles["value"], roles["reward"])
    other, _ = build_shared(tiny_llava_dir, adapters, args_for(tiny_llava_dir))
    assert not same_vision(host, other)


def test_a_reward_model_on_a_shared_base_scores_as_one_with_a_base_of_its_own(
    work: Work, policy: Path, reward_model: Path, red_image: Any, blue_image: Any
) -> None:
    args = LlavaModelConfig(model_name_or_path=str(work.base), dtype="float32")
    host = load_adapter(load_policy(args), str(policy), is_trainable=True)
    loaded = [SharedBase(host, str(work.base), None)]
    alone = FactualReward.from_pretrained(str(reward_model), model_args=args)
    shared = FactualReward.from_pretrained(str(reward_model), model_args=args, shared=loaded)
    answers = [test_entry_points.answer(text) for text in ("a square", "a dog", "a square")]
    images, captions = [[red_image], [blue_image], []], [["a red square"]] * 3
    given = {"prompts": [test_entry_points.QUESTION] * 3, "completions": answers, "images": images}
    assert shared(**given, captions=captions) == alone(**given, captions=captions)
    assert host.training is False and host.active_adapter == "default"
    with pytest.raises(ValueError, match="caption"):
        shared(**given)
    assert host.active_adapter == "default"


def test_ppo_encodes_each_image_once_for_the_roles_of_a_base_and_once_for_the_reward(
    work: Work, policy: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers: list[Tower] = []

    def load_counted(*given: Any) -> Any:
        model = load_policy(*given)
        towers.append(Tower(model))
        return model

    monkeypatch.setattr("trl_llava.ppo.roles.load_policy", load_counted)
    words = [*start(policy, reward_model), *UNCLIPPED, "--max_tokens_per_micro_batch", "60"]
    trainer = work.ppo("once", *words, "--image_cache_gib", "4")  # an old recipe's key, which does nothing
    (tower,) = towers
    rewarded = trainer.args.num_total_batches * trainer.args.batch_size
    assert trainer.scorer.reward_funcs[0].max_tokens == 60
    assert tower.images == 2 * rewarded
    expected = work.ppo("expected", *words, "--share_base", "false")
    for ours, theirs in zip(logged(trainer), logged(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
