"""Image features computed once give the numbers that pixels give in every pass, for every family."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from datasets import Dataset, Image, List
from reference_passes import response_logits
from tiny_trainers import make_adapter, ppo_trainer
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from trl_llava.collators import PromptCollator
from trl_llava.data import rows_from
from trl_llava.generation import Generator
from trl_llava.image_features import GIB, ImageFeatures
from trl_llava.passes import response_values
from trl_llava.rollout import ModelInputs
from trl_llava.sequence_classification import (
    LlavaForSequenceClassification,
    LlavaNextForSequenceClassification,
    LlavaOnevisionForSequenceClassification,
)

SCORE_CLASSES = {
    "tiny_llava_dir": LlavaForSequenceClassification,
    "tiny_llava_next_dir": LlavaNextForSequenceClassification,
    "tiny_llava_onevision_dir": LlavaOnevisionForSequenceClassification,
}


def make_inputs(family: str, folder: Path) -> ModelInputs:
    """Four rows with 1, 0, 2 and 1 images of different sizes."""
    if family == "tiny_llava_onevision_dir":
        processor = tiny_models.onevision_processor()
    else:
        processor = AutoProcessor.from_pretrained(folder)
    pictures = [
        [tiny_models.image("red")],
        [],
        [tiny_models.image("blue", (30, 60)), tiny_models.image("green", (50, 20))],
        [tiny_models.image("black", (28, 28))],
    ]
    questions = [[{"role": "user", "content": f"What is in the picture {i}?"}] for i in range(4)]
    dataset = Dataset.from_dict({"prompt": questions, "images": pictures}).cast_column("images", List(Image()))
    batch = PromptCollator(processor)(list(rows_from(dataset, "prompt")))
    return ModelInputs.from_batch(batch, torch.device("cpu"))


def policy_and_value(family: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    policy = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    torch.manual_seed(0)
    value = SCORE_CLASSES[family].from_pretrained(folder, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(value.score.weight)
    return policy, value.eval().requires_grad_(False)


@pytest.mark.parametrize("family", SCORE_CLASSES)
def test_features_give_what_pixels_give(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    policy, value = policy_and_value(family, folder)
    pixels = make_inputs(family, folder)
    cache = ImageFeatures(GIB)
    features = cache.encode(policy, pixels, batch_size=2)
    assert "pixel_values" not in features.extras and len(cache) == 4
    responses = torch.randint(10, 300, (4, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(responses, dtype=torch.bool)
    with torch.no_grad():
        for rows in ([0, 1, 2, 3], [2], [1], [3, 0]):
            part = (responses[rows], mask[rows])
            expected = response_logits(policy, pixels.select(rows), *part, temperature=1.0)
            actual = response_logits(policy, features.select(rows), *part, temperature=1.0)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                response_values(value, cache.encode(value, pixels, 8).select(rows), *part),
                response_values(value, pixels.select(rows), *part),
                rtol=1e-4,
                atol=1e-5,
            )


def make_generator(**changes: Any) -> Generator:
    settings = {
        "response_length": 6,
        "temperature": 1.0,
        "seed": 0,
        "local_rollout_forward_batch_size": 3,
        "cache_implementation": "dynamic",
        "share_prefix": True,
        "torch_compile": False,
        **changes,
    }
    return Generator(
        SimpleNamespace(**settings), Accelerator(), SimpleNamespace(pad_token_id=3), stop_token_id=2, suppressed=[4]
    )


@pytest.mark.parametrize("family", SCORE_CLASSES)
def test_a_static_cache_and_prompts_run_once_give_the_same_answers(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    policy, _ = policy_and_value(family, folder)
    pixels = make_inputs(family, folder)
    rows = [0, 2, 0, 1, 2, 2, 3]
    for inputs in (pixels.select(rows), ImageFeatures(GIB).encode(policy, pixels, batch_size=8).select(rows)):
        expected = make_generator(share_prefix=False)(policy, inputs, 1).responses
        assert len({tuple(row) for row in expected.tolist()}) == 7
        seen: list[tuple[int, ...]] = []
        handle = policy.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])),
            with_kwargs=True,
        )
        once = make_generator(local_rollout_forward_batch_size=8)(policy, inputs, 1).responses
        handle.remove()
        assert seen[:2] == [(4, inputs.query_length - 1), (7, 1)]
        static = make_generator(cache_implementation="static", local_rollout_forward_batch_size=8)(
            policy, inputs, 1
        ).responses
        assert torch.equal(once, expected) and torch.equal(static, expected)


@pytest.mark.parametrize("family", SCORE_CLASSES)
def test_generation_from_features_is_generation_from_pixels(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    policy, _ = policy_and_value(family, folder)
    pixels = make_inputs(family, folder)
    generator = make_generator()
    for step in (None, 1):
        expected = generator(policy, pixels, step).responses
        actual = generator(policy, ImageFeatures(GIB).encode(policy, pixels, batch_size=8), step).responses
        assert torch.equal(actual, expected)


def test_the_image_matters(tiny_llava_dir: Path) -> None:
    """Else the tests above would also pass with the features of another picture."""
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    cache = ImageFeatures(GIB)
    features = cache.encode(policy, make_inputs("tiny_llava_dir", tiny_llava_dir), batch_size=8)
    swapped = cache.encode(policy, make_inputs("tiny_llava_dir", tiny_llava_dir), batch_size=8)
    swapped.digests[0], swapped.digests[1] = swapped.digests[1], swapped.digests[0]
    part = (torch.full((1, 3), 20), torch.ones(1, 3, dtype=torch.bool))
    with torch.no_grad():
        first = response_logits(policy, features.select([0]), *part, temperature=1.0)
        second = response_logits(policy, swapped.select([0]), *part, temperature=1.0)
    assert (first - second).abs().max() > 1e-3


def test_a_trained_projector_is_run_in_every_pass(tiny_llava_dir: Path) -> None:
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    policy.model.multi_modal_projector.requires_grad_(True)
    assert ImageFeatures(GIB).encode(policy, inputs, batch_size=8) is inputs


def test_each_distinct_picture_is_encoded_once_a_step_for_each_model(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llava_dir, tmp_path / "adapter")
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path / "out", total_episodes=4, num_ppo_epochs=3)
    for parameter in (p for n, p in trainer.model.named_parameters() if "vision_tower" in n or "projector" in n):
        assert not parameter.requires_grad
    seen = {"policy": 0, "value_model": 0}
    model = trainer.accelerator.unwrap_model(trainer.model)
    for role in seen:
        tower = getattr(model, role).get_base_model().model.vision_tower

        def count(module: torch.nn.Module, args: tuple, role: str = role) -> None:
            seen[role] += args[0].shape[0]

        tower.register_forward_pre_hook(count)
    batch = next(iter(trainer.dataloader))
    trainer.train()
    pictures = [picture.tobytes() for images in batch["columns"]["images"] for picture in images]
    assert len(pictures) == 3 and seen == {"policy": len(set(pictures)), "value_model": len(set(pictures))}
