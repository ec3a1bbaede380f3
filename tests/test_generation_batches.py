"""Generation sized by memory: how many rows a bound has room for, and that no split changes an answer."""

import pytest
import tiny_trainers
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo.generation_batches import bytes_per_token, rows_at_once

# 2 layers and one that grows, 2 key-value heads of 8, fp32, keys and values
TOKEN = 2 * 3 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("row", "bound", "most", "expected"),
    [(100, 1000, 64, 10), (100, 1099, 64, 10), (100, 1000, 4, 4), (100, 99, 64, 1), (100, float("inf"), 64, 64)],
)
def test_a_bound_holds_whole_rows_and_one_at_least(row, bound, most, expected):
    assert rows_at_once(row, bound, most) == expected


def test_the_bytes_of_a_token_are_those_of_the_models_cache(tiny_llava_dir):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)
    assert bytes_per_token(model.config, 4) == TOKEN
    cache = model(input_ids=torch.ones(3, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == bytes_per_token(AutoConfig.from_pretrained(tiny_llava_dir), 4) * 2 // 3 * 30


def answers_of(base, tmp_path, monkeypatch, rows=None, **changes):
    """The ids that a trainer samples for its first batch, and how many rows it answered at once."""
    adapter = tiny_trainers.make_adapter(base, tmp_path / "adapter")
    trainer = tiny_trainers.ppo_trainer(base, adapter, tmp_path / "run", **changes)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = ModelInputs.from_batch(batch, trainer.accelerator.device)
    if rows is not None:  # so many have room
        length = max(inputs.lengths) + trainer.args.response_length
        trainer.args.generation_cache_gib = rows * TOKEN * length / 2**30
    sizes: list[int] = []

    def counts(decode):
        return lambda policy, part, keys: sizes.append(len(part)) or decode(policy, part, keys)

    generator = trainer.generator
    monkeypatch.setattr(generator.decoder, "decode", counts(generator.decoder.decode))
    monkeypatch.setattr(generator, "_generate_plainly", counts(generator._generate_plainly))
    with torch.no_grad():
        answers = generator.generate(trainer.policy_model, inputs, 1)
    return answers, sizes


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_bound_splits_the_rows_and_changes_no_answer(tiny_llava_dir, tmp_path, monkeypatch, capsys, cache):
    common = {"cache_implementation": cache, "response_length": 6}
    expected, sizes = answers_of(tiny_llava_dir, tmp_path / "all", monkeypatch, **common)
    assert sizes == [4]
    found, sizes = answers_of(tiny_llava_dir, tmp_path / "three", monkeypatch, rows=3, **common)
    assert sizes == [3, 1]
    assert torch.equal(found.responses, expected.responses) and torch.equal(found.mask, expected.mask)
    assert found.logprobs is not None  # told by generation, so a pass over other rows rounds otherwise
    assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-6)
    assert "completes up to 3 prompts at once" in capsys.readouterr().out


def test_trls_row_count_stays_the_most(tiny_llava_dir, tmp_path, monkeypatch):
    _, sizes = answers_of(tiny_llava_dir, tmp_path, monkeypatch, local_rollout_forward_batch_size=2)
    assert sizes == [2, 2]


def test_a_row_above_the_bound_runs_on_its_own(tiny_llava_dir, tmp_path, monkeypatch):
    _, sizes = answers_of(tiny_llava_dir, tmp_path, monkeypatch, rows=0.5)
    assert sizes == [1, 1, 1, 1]


def test_a_bound_of_nothing_is_refused():
    with pytest.raises(ValueError, match="generation_cache_gib"):
        LlavaPPOConfig(output_dir="x", generation_cache_gib=0.0, use_cpu=True, bf16=False)
