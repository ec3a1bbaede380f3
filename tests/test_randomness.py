"""The noise is what it says: uniform, Gumbel, and a function of seed, step, row and position alone."""

import numpy as np
import pytest
import torch

from trl_llava.ppo.randomness import RolloutBatches, RowNoise, mini_batch_order, row_keys, uniform

LITERAL_KEYS = [8341986609271305484, 5128932732482739708]
LITERAL_UNIFORM = [[0.2003281964821776, 0.6298012975335964], [0.6349930529546092, 0.6679365319306]]


def test_literal_values_so_that_a_run_repeats_on_any_machine() -> None:
    keys = row_keys(seed=7, step=3, rows=torch.tensor([0, 1]))
    assert keys.tolist() == LITERAL_KEYS
    torch.testing.assert_close(uniform(keys, 5, 2), torch.tensor(LITERAL_UNIFORM, dtype=torch.float64))


def test_a_rows_noise_does_not_depend_on_the_rows_beside_it() -> None:
    together = uniform(row_keys(1, 2, torch.arange(8)), 3, 50)
    alone = uniform(row_keys(1, 2, torch.tensor([5])), 3, 50)
    assert torch.equal(together[5:6], alone)


def test_seed_step_row_position_and_token_all_change_the_noise() -> None:
    base = uniform(row_keys(1, 2, torch.tensor([3])), 4, 1000)
    for other in (
        uniform(row_keys(2, 2, torch.tensor([3])), 4, 1000),
        uniform(row_keys(1, 3, torch.tensor([3])), 4, 1000),
        uniform(row_keys(1, 2, torch.tensor([4])), 4, 1000),
        uniform(row_keys(1, 2, torch.tensor([3])), 5, 1000),
    ):
        correlation = torch.corrcoef(torch.cat((base, other)))[0, 1].item()
        assert abs(correlation) < 0.1


def test_the_numbers_are_uniform() -> None:
    draws = uniform(row_keys(0, 0, torch.arange(100)), 0, 1000)
    assert draws.min() > 0 and draws.max() < 1
    counts = torch.histc(draws, bins=10, min=0, max=1)
    expected = draws.numel() / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees of freedom, p = .001


def test_the_argmax_is_a_draw_from_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    rows = torch.arange(20000)
    noisy = RowNoise(row_keys(0, 0, rows), prompt_length=3, temperature=0.5)(
        torch.zeros(len(rows), 3, dtype=torch.long), logits.expand(len(rows), 4)
    )
    shares = torch.bincount(noisy.argmax(1), minlength=4) / len(rows)
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(0), atol=0.01, rtol=0)


def test_batches_cover_an_epoch_once_and_are_shared_out() -> None:
    def batches(process: tuple[int, int], steps: range = range(6)) -> list[list[int]]:
        return list(RolloutBatches(rows=13, batch_size=4, process=process, seed=3, steps=steps))

    whole = batches((0, 1))
    first, second = batches((0, 2)), batches((1, 2))
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    for epoch in (whole[:3], whole[3:]):
        rows = [row for batch in epoch for row in batch]
        assert len(set(rows)) == 12 and set(rows) <= set(range(13))
    assert whole[:3] != whole[3:]
    assert batches((0, 1), range(4, 6)) == whole[4:]  # a resumed run goes on where it was


def test_fewer_rows_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 usable rows, fewer than the 4 of one batch"):
        RolloutBatches(rows=3, batch_size=4, process=(0, 1), seed=0, steps=range(1))


def test_mini_batch_order_is_a_permutation_of_its_own_for_each_pass() -> None:
    orders = {
        tuple(mini_batch_order(8, 1, 0, process, step, epoch))
        for process in (0, 1)
        for step in (1, 2)
        for epoch in (0, 1)
    }
    assert len(orders) == 8 and all(sorted(order) == list(range(8)) for order in orders)


def test_mini_batches_hold_the_same_rows_on_any_number_of_processes() -> None:
    def sets(processes: int) -> list[set[int]]:
        share = 12 // processes
        orders = [mini_batch_order(share, 3, 7, process, 2, 1) + process * share for process in range(processes)]
        return [set().union(*(np.split(order, 3)[part].tolist() for order in orders)) for part in range(3)]

    assert sets(1) == sets(2) == sets(4)
    assert [len(part) for part in sets(1)] == [4, 4, 4] and set().union(*sets(1)) == set(range(12))
    assert sets(1) != [{i for i in range(12) if i % 3 == part} for part in range(3)]
