"""Micro-batches: alike in length, within the budget, and as many on every process."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_trainers import favour_the_stop_token, make_adapter, ppo_trainer, weights

from trl_llava.models.micro_batches import Lengths, micro_batches
from trl_llava.ppo.decoding import CACHE

ALONE = SimpleNamespace(num_processes=1)
LENGTHS = Lengths(prompts=[10, 4, 10, 4, 30], responses=[2, 1, 8, 3, 1])


def test_rows_are_sorted_by_length_and_cut_by_number() -> None:
    assert micro_batches(range(5), LENGTHS, 2, None, ALONE) == [[4, 2], [0, 3], [1]]
    assert micro_batches([3, 1], LENGTHS, 8, None, ALONE) == [[3, 1]]


def test_the_budget_counts_padding_and_a_longer_row_runs_alone() -> None:
    # 31; then 18; then 2 rows as long as the longer one
    assert micro_batches(range(5), LENGTHS, 8, 24, ALONE) == [[4], [2], [0, 3], [1]]
    assert LENGTHS.padded([0, 3]) == 2 * (10 + 2)
    assert micro_batches(range(5), LENGTHS, 8, 1, ALONE) == [[4], [2], [0], [3], [1]]


def test_rows_with_one_prompt_stay_together_and_pay_for_it_once() -> None:
    lengths = Lengths(prompts=[10, 4, 10, 4], responses=[1, 1, 2, 3], groups=[0, 1, 0, 1])
    assert lengths.padded([0, 2]) == 10 + 1 + 2
    assert lengths.padded([0, 1, 2]) == 2 * 13
    assert micro_batches(range(4), lengths, 2, None, ALONE) == [[2, 0], [3, 1]]
    assert micro_batches(range(4), lengths, 4, 13, ALONE) == [[2, 0], [3, 1]]


@pytest.mark.parametrize(("most", "expected"), [(2, [[4, 2], [0, 3, 1]]), (4, [[4], [2], [0], [3, 1]])])
def test_every_process_runs_as_many_as_the_one_with_most(most: int, expected: list[list[int]]) -> None:
    others = SimpleNamespace(num_processes=2, device="cpu", gather=lambda own: torch.tensor([int(own), most]))
    assert sorted(micro_batches(range(5), LENGTHS, 8, 90, others)) == sorted(expected)


def test_a_budget_changes_neither_logged_numbers_nor_weights(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llava_dir, tmp_path / "adapter")
    runs = []
    for changes in (
        {"per_device_train_batch_size": 8, "local_rollout_forward_batch_size": 8, "gradient_accumulation_steps": 1},
        {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "local_rollout_forward_batch_size": 8,
            "max_tokens_per_micro_batch": 100,
            "logits_chunk_size": 3,
        },
    ):
        trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, total_episodes=16, num_ppo_epochs=2, **changes)
        favour_the_stop_token(trainer.policy_model)
        passes = []
        decoder = trainer.accelerator.unwrap_model(trainer.model).policy.get_base_model().model
        decoder.register_forward_pre_hook(
            lambda module, args, kwargs, passes=passes: (
                passes.append(kwargs["input_ids"].numel())
                if kwargs.get(CACHE) is None and kwargs["input_ids"].shape[1] > 2
                else None
            ),
            with_kwargs=True,
        )
        trainer.train()
        runs.append((trainer.state.log_history, weights(trainer), passes))
    (plain, plain_weights, _), (budgeted, budgeted_weights, passes) = runs
    assert max(passes) <= 100 and len(passes) > 12
    untimed = [name for name in plain[0] if not name.startswith(("time/", "tokens_per_second", "eps"))]
    for expected, actual in zip(plain, budgeted, strict=True):
        for name in untimed:
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    for name, value in plain_weights.items():
        torch.testing.assert_close(budgeted_weights[name], value, rtol=1e-4, atol=2e-5, msg=name)
