"""Pictures are encoded once, within a bound, and nobody can tell from the numbers."""

import gc
from pathlib import Path
from typing import Any

import pytest
import test_entry_points
import torch
from test_entry_points import Work
from test_passes import make_inputs, policy_and_value
from test_share_base_runs import logged, start
from test_shared_base import args_for, build_shared, save_adapters

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapter_switching import active_adapter
from trl_llava.models.adapters import load_adapter
from trl_llava.models.image_features import GIB, ImageFeatures, bytes_kept
from trl_llava.models.load import load_policy
from trl_llava.models.shared_base import SharedBase
from trl_llava.rewards.factual_reward import FactualReward

work, policy, reward_model = test_entry_points.work, test_entry_points.policy, test_entry_points.reward_model
ONE = 16 * 32 * 4  # bytes of a tiny LLaVA's features of a picture: tokens, width, float32


class Tower:
    """Counts the pictures that run through a tower."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.pictures = 0
        self.handle = model.model.vision_tower.register_forward_pre_hook(self.count)

    def count(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...], *rest: Any) -> None:
        self.pictures += len(given[0])


def test_a_picture_is_encoded_once_and_what_is_not_in_use_makes_room(tiny_llava_dir: Path) -> None:
    model, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    tower, cache = Tower(model), ImageFeatures(3 * ONE)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)  # 1, 0, 2 and 1 pictures, all different
    first = cache.encode(model, inputs.select([0, 1, 2]), 8)
    assert (tower.pictures, len(cache), cache.bytes) == (3, 3, 3 * ONE)
    assert "pixel_values" not in first.extras
    assert cache.encode(model, inputs.select([0, 1, 2, 0]), 8).digests[-1] == first.digests[0]
    assert tower.pictures == 3
    last = cache.encode(model, inputs.select([3]), 8)  # no room: all that is kept is in use
    assert (tower.pictures, len(cache)) == (4, 3) and "pixel_values" in last.extras
    for _ in range(2):
        last.image_kwargs()
    assert (tower.pictures, len(cache)) == (6, 3)
    cache.begin_step()
    cache.encode(model, inputs.select([0, 3]), 8)
    assert (tower.pictures, len(cache), cache.bytes) == (7, 3, 3 * ONE)
    cache.encode(model, inputs.select([0, 3]), 8)
    assert tower.pictures == 7


def test_what_is_kept_may_be_used_in_training_though_it_was_made_in_inference_mode(tiny_llava_dir: Path) -> None:
    model, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    cache = ImageFeatures(GIB)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inputs = cache.attach(model, make_inputs("tiny_llava_dir", tiny_llava_dir))
        inputs.image_kwargs()
    (features,) = (
        cache.encode(model, inputs.select([0]), 8).image_kwargs()["mm_encoder_outputs"]["image"].pooler_output
    )
    assert features.dtype == torch.float32 and not features.is_inference()


def test_another_picture_and_another_tower_are_told_apart(tiny_llava_dir: Path) -> None:
    model, value = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    cache, inputs = ImageFeatures(GIB), make_inputs("tiny_llava_dir", tiny_llava_dir)
    cache.encode(model, inputs, 8)
    assert len(set(inputs.digests)) == 4
    tower = Tower(value)
    cache.encode(value, inputs, 8)
    assert tower.pictures == 4 and len(cache) == 8


def test_a_model_that_is_gone_leaves_its_features_to_no_other(tiny_llava_dir: Path) -> None:
    gone, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    model, value = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    cache, inputs = ImageFeatures(GIB), make_inputs("tiny_llava_dir", tiny_llava_dir)
    cache.attach(gone, inputs)
    cache.encode(value, inputs, 8)
    del gone
    gc.collect()
    cache.encode(model, inputs, 8)
    assert len(cache) == 8  # four pictures of each of two towers


def test_pinned_memory_is_counted_as_torch_takes_it(tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU features are pinned, and torch rounds each block up: 576 x 4096 x 2 bytes take 8 MiB."""
    assert bytes_kept(torch.empty(576, 4096, dtype=torch.bfloat16), pinned=True) == 8 * 2**20
    assert bytes_kept(torch.empty(576, 4096, dtype=torch.bfloat16), pinned=False) == 4.5 * 2**20
    assert bytes_kept(torch.empty(512, 4096, dtype=torch.bfloat16), pinned=True) == 4 * 2**20
    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.shape) or self)
    model, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    model.model.multi_modal_projector.linear_2 = torch.nn.Linear(32, 33).requires_grad_(False)  # no power of two
    cache, inputs = ImageFeatures(5 * ONE), make_inputs("tiny_llava_dir", tiny_llava_dir).select([0, 2])
    cache.encode(model, inputs, 8)
    assert pinned == [(16, 33)] * 2 and (len(cache), cache.bytes) == (2, 4 * ONE)
    cache.begin_step()
    cache.encode(model, make_inputs("tiny_llava_dir", tiny_llava_dir).select([3]), 8)
    assert (len(cache), cache.bytes) == (2, 4 * ONE)  # one made room


@pytest.mark.parametrize("family", ["tiny_llava_next_dir", "tiny_llava_onevision_dir"])
def test_a_picture_is_known_again_in_a_batch_that_is_padded_to_more_tiles(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    model, _ = policy_and_value(family, folder)
    tower, cache = Tower(model), ImageFeatures(GIB)
    inputs = make_inputs(family, folder)
    cache.encode(model, inputs, 8)
    alone = inputs.select([0])
    alone.digests = []
    pixels = alone.extras["pixel_values"]
    alone.extras["pixel_values"] = torch.cat([pixels, torch.zeros_like(pixels[:, :1])], 1)
    before = tower.pictures
    cache.encode(model, alone, 8)
    assert tower.pictures == before
    alone.digests, alone.extras["pixel_values"] = [], pixels + 1
    cache.encode(model, alone, 8)
    assert tower.pictures > before


def test_roles_whose_adapters_hold_the_projector_see_for_themselves(tiny_llava_dir: Path, tmp_path: Path) -> None:
    part = ["multi_modal_projector"]
    adapters = save_adapters(tiny_llava_dir, tmp_path, policy=part, value=part)
    host, roles = build_shared(tiny_llava_dir, adapters, args_for(tiny_llava_dir))
    inputs, cache = make_inputs("tiny_llava_dir", tiny_llava_dir), ImageFeatures(GIB)
    assert cache.attach(host, inputs) is inputs and cache.attach(roles["value"], inputs) is inputs  # trained
    cache.encode(roles["reward"], inputs, 8)
    assert len(cache) == 4
    with active_adapter(host, "reference"):  # sees with the base's projector, as the reward model does
        cache.encode(host, inputs, 8)
    assert len(cache) == 4
    host.requires_grad_(False)
    for role, known in (("value", 8), ("policy", 12)):
        found = cache.encode(roles["value"] if role == "value" else host, inputs, 8)
        assert len(cache) == known
        with torch.no_grad(), active_adapter(host, "value_role" if role == "value" else "default"):
            pixels = inputs.extras["pixel_values"]
            expected = host.get_base_model().model.get_image_features(pixel_values=pixels, return_dict=True)
        got = found.image_kwargs()["mm_encoder_outputs"]["image"].pooler_output
        assert all(torch.equal(a, b) for a, b in zip(got, expected.pooler_output, strict=True))


def test_a_reward_model_scores_alike_with_and_without(
    work: Work, policy: Path, reward_model: Path, red_image: Any, blue_image: Any
) -> None:
    args = LlavaModelConfig(model_name_or_path=str(work.base), dtype="float32")
    host = load_adapter(load_policy(args), str(policy), is_trainable=True)
    loaded = [SharedBase(host, str(work.base), None)]
    alone = FactualReward.from_pretrained(str(reward_model), model_args=args)
    shared = FactualReward.from_pretrained(str(reward_model), model_args=args, shared=loaded)
    tower = Tower(host.get_base_model())
    answers = [test_entry_points.answer(text) for text in ("a square", "a dog", "a square")]
    images, captions = [[red_image], [blue_image], []], [["a red square"]] * 3
    given = {"prompts": [test_entry_points.QUESTION] * 3, "completions": answers, "images": images}
    expected = alone(**given, captions=captions)
    assert shared(**given, captions=captions) == expected and tower.pictures == 2
    shared.image_features = ImageFeatures(GIB)
    for _ in range(2):
        assert shared(**given, captions=captions) == expected
    assert tower.pictures == 4
    assert host.training is False and host.active_adapter == "default"
    with pytest.raises(ValueError, match="caption"):
        shared(**given)
    assert host.active_adapter == "default"


@pytest.mark.parametrize("gib", ["4", "0", str(1.5 * ONE / GIB)])
def test_the_bound_changes_no_number_and_each_picture_is_encoded_once_a_step(
    work: Work, policy: Path, reward_model: Path, gib: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, caches = [], []
    begin = ImageFeatures.begin_step

    def counted(cache: ImageFeatures) -> None:
        caches.append(cache)
        begin(cache)

    monkeypatch.setattr(ImageFeatures, "begin_step", counted)
    run = ImageFeatures._run

    def running(cache: ImageFeatures, model: torch.nn.Module, seer: str, inputs: Any, rows: list[int]) -> Any:
        counts.append((len(caches), sum(inputs.images_per_row[row] for row in rows)))
        return run(cache, model, seer, inputs, rows)

    monkeypatch.setattr(ImageFeatures, "_run", running)
    words = [*start(policy, reward_model), "--image_cache_gib", gib, "--max_tokens_per_micro_batch", "60"]
    trainer = work.ppo(f"cache_{gib}", *words)
    (cache,) = set(caches)
    reward = trainer.scorer.reward_funcs[0]
    assert reward.image_features is cache is trainer.image_features and reward.max_tokens == 60
    # Two steps over red and blue squares: the second step finds what it needs.
    assert len(cache) == {"4": 2, "0": 0}.get(gib, 1)
    assert (sum(pictures for _, pictures in counts) == 2) == (gib == "4")
    monkeypatch.undo()
    expected = work.ppo(f"expected_{gib}", *start(policy, reward_model), "--share_base", "false")
    for ours, theirs in zip(logged(trainer), logged(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
