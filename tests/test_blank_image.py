"""Tower and projector run in every pass of a run of several processes, and change nothing there."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from test_families import policy_of, rows_of
from tiny_families import FAMILIES

from trl_llava.data.collators import SFTCollator
from trl_llava.models.blank_image import encode_on_every_process
from trl_llava.models.load import load_processor
from trl_llava.models.vision_tower import part_of

TWO_PROCESSES = SimpleNamespace(
    num_processes=2, distributed_type=DistributedType.MULTI_CPU, state=SimpleNamespace(deepspeed_plugin=None)
)


@pytest.mark.parametrize("name", FAMILIES)
def test_results_stay_and_every_trained_weight_gets_a_gradient(
    name: str, family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder(name)
    processor, policy = load_processor(str(folder)), policy_of(folder, freeze_projector=False)
    rows = rows_of(processor)
    batches = [SFTCollator(processor)(some) for some in (rows, [rows[1]])]
    expected = [policy(**batch, use_cache=False).logits for batch in batches]
    assert encode_on_every_process(policy, processor, TWO_PROCESSES)
    for batch, logits in zip(batches, expected, strict=True):
        found = policy(**batch, use_cache=False).logits
        torch.testing.assert_close(found, logits, rtol=0, atol=0)
        policy.zero_grad()
        found.sum().backward()
        assert not [key for key, weight in policy.named_parameters() if weight.requires_grad and weight.grad is None]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_blank_image_enters_where_images_do(name: str, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder(name)
    processor, policy = load_processor(str(folder)), policy_of(folder, freeze_projector=False)
    encode_on_every_process(policy, processor, TWO_PROCESSES)
    for key, weight in policy.named_parameters():
        weight.requires_grad_(part_of(key) == "projector")
    seen = []
    policy.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].requires_grad), with_kwargs=True
    )
    policy(**SFTCollator(processor)([rows_of(processor)[1]]), use_cache=False)
    assert seen == [True]
