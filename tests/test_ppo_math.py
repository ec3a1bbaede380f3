"""Every formula against literal numbers, and against garbage at the padding."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_llava.ppo import ppo_math
from trl_llava.ppo.update import Updater

NAN = float("nan")
MASK = torch.tensor([[True, True, False], [True, True, True]])


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_response_mask_ends_after_the_first_stop_token():
    responses = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [2, 2, 0, 0], [5, 0, 6, 0]])
    assert ppo_math.response_mask(responses, 2).tolist() == [
        [True, True, False, False],
        [True, True, True, True],
        [True, False, False, False],
        [True, True, True, True],
    ]


def test_without_a_stop_token_every_token_is_real():
    assert ppo_math.response_mask(torch.tensor([[5, 0, 2, 0]]), None).all()


def test_masked_mean_ignores_even_nan_at_padding():
    values = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]])
    assert ppo_math.masked_mean(values, MASK).item() == pytest.approx(3.0)


def test_masked_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no real token"):
        ppo_math.masked_mean(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))


def test_masked_mean_is_over_all_processes():
    # The other process holds 3 real tokens that sum to 9.
    def add_the_other(total: torch.Tensor) -> torch.Tensor:
        return total + (3 if total.dtype == torch.long else 9.0)

    values = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]])
    assert ppo_math.masked_mean(values, MASK, add_the_other).item() == pytest.approx(24 / 8)


def test_masked_whiten():
    values = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]])
    unit = 1 / math.sqrt(2.5)  # the variance of 1..5 with Bessel's correction
    close(ppo_math.masked_whiten(values, MASK), [[-2 * unit, -unit, 0.0], [0.0, unit, 2 * unit]])
    close(
        ppo_math.masked_whiten(values, MASK, shift_mean=False),
        [[3 - 2 * unit, 3 - unit, 0.0], [3.0, 3 + unit, 3 + 2 * unit]],
    )


def test_masked_whiten_of_one_token_is_an_error():
    with pytest.raises(ValueError, match="at least 2 real tokens, found 1"):
        ppo_math.masked_whiten(torch.ones(1, 2), torch.tensor([[True, False]]))


def test_kl_estimators():
    logprobs = torch.tensor([[-1.0, -2.0, NAN], [-1.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.5, -1.0, 3.0], [-1.0, -2.0, -1.0]])
    close(ppo_math.kl_per_token(logprobs, ref, MASK), [[0.5, -1.0, 0.0], [0.0, 1.0, 0.0]])
    close(ppo_math.kl_per_token(logprobs, ref, MASK, clamp=True), [[0.5, 0.0, 0.0], [0.0, 1.0, 0.0]])
    close(
        ppo_math.kl_per_token(logprobs, ref, MASK, "k3"),
        [[math.exp(-0.5) - 0.5, math.e - 2.0, 0.0], [0.0, math.exp(-1.0), 0.0]],
    )


def test_the_score_lands_on_the_last_real_token():
    kl = torch.tensor([[0.5, 1.0, 0.0], [0.0, 1.0, 2.0]])
    close(
        ppo_math.shape_rewards(torch.tensor([7.0, -3.0]), kl, MASK, kl_coef=0.1),
        [[-0.05, 6.9, 0.0], [0.0, -0.1, -3.2]],
    )
    close(
        ppo_math.shape_rewards(torch.tensor([7.0, -3.0]), kl, MASK, kl_coef=0.1, scale=10.0),
        [[-0.5, 69.0, 0.0], [0.0, -1.0, -32.0]],
    )


def test_an_empty_response_is_named():
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        ppo_math.last_real_token(torch.tensor([[True, False], [False, False]]))


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 99.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 1.0, 50.0], [0.1, 0.2, 0.3]])
    rewards = torch.where(MASK, rewards, torch.zeros_like(rewards))
    # Row 0: delta1 = 2 - 1 = 1; delta0 = 1 + .9*1 - .5 = 1.4; A0 = 1.4 + .9*.8*1 = 2.12
    # Row 1: delta2 = .7; delta1 = .9*.3 - .2 = .07; delta0 = .9*.2 - .1 = .08; A1 = .07 + .72*.7; A0 = .08 + .72*A1
    advantages, returns = ppo_math.gae(rewards, values, MASK, gamma=0.9, lam=0.8)
    a1 = 0.07 + 0.72 * 0.7
    close(advantages, [[2.12, 1.0, 0.0], [0.08 + 0.72 * a1, a1, 0.7]])
    close(returns, [[2.62, 2.0, 0.0], [0.18 + 0.72 * a1, a1 + 0.2, 1.0]])


def test_gae_of_a_padded_row_equals_that_of_the_row_alone():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(1, 4, generator=generator), torch.randn(1, 4, generator=generator)
    alone, _ = ppo_math.gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), 0.99, 0.95)
    padded_rewards = torch.cat([rewards, torch.full((1, 3), 8.0)], 1)
    padded_values = torch.cat([values, torch.full((1, 3), -5.0)], 1)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    padded, returns = ppo_math.gae(padded_rewards, padded_values, mask, 0.99, 0.95)
    assert torch.equal(padded[:, :4], alone)
    assert not padded[:, 4:].any() and not returns[:, 4:].any()


def test_policy_loss():
    old = torch.zeros(1, 4)
    new = torch.log(torch.tensor([[1.1, 1.5, 0.5, 3.0]]))
    advantages = torch.tensor([[1.0, 2.0, -1.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    terms = ppo_math.policy_loss(new, old, advantages, mask, cliprange=0.2)
    close(terms.losses, [[-1.1, -2.4, 0.8, 0.0]])
    assert terms.clipped.tolist() == [[False, True, True, False]]
    close(terms.ratio, [[1.1, 1.5, 0.5, 1.0]])


def test_policy_loss_gives_padding_no_gradient():
    new = torch.tensor([[0.3, 0.4]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    ppo_math.policy_loss(new, torch.zeros(1, 2), torch.ones(1, 2), mask, 0.2).losses.sum().backward()
    assert new.grad[0, 1] == 0


def test_value_loss():
    values = torch.tensor([[1.0, 2.0, 0.0, 9.0]])
    old = torch.tensor([[1.0, 1.0, 0.3, 0.0]])
    returns = torch.tensor([[2.0, 2.0, 0.0, 1.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss = ppo_math.value_loss(values, old, returns, mask, cliprange=0.2)
    close(loss.losses, [[0.5, 0.32, 0.005, 0.0]])
    assert loss.clipped.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, 3.0, [[2.0, 3.0, 1.0], [0.25, 1.0, 1.0]]),
        ("token_truncate", 0.5, None, [[2.0, 4.0, 1.0], [0.5, 1.0, 1.0]]),
        ("token_mask", 0.5, 3.0, [[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
        ("sequence_truncate", None, 3.0, [[3.0, 3.0, 3.0], [0.25, 0.25, 0.25]]),
        ("sequence_mask", None, 3.0, [[0.0, 0.0, 0.0], [0.25, 0.25, 0.25]]),
        ("sequence_mask", None, None, [[8.0, 8.0, 8.0], [0.25, 0.25, 0.25]]),
    ],
)
def test_importance_weights_are_ratios_within_limits(mode, low, high, expected):
    """Ratios 2 and 4, then padding; 1/4 and one that vLLM does not know, then padding."""
    ours = torch.tensor([[2.0, 4.0, 9.0], [1.0, 5.0, 9.0]]).log()
    theirs = torch.tensor([[1.0, 1.0, 1.0], [4.0, math.nan, 1.0]]).log()
    mask = torch.tensor([[True, True, False], [True, True, False]])
    found = ppo_math.importance_weights(ours, theirs, mask, mode, low, high)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_ratios_variance_is_over_tokens_and_not_called_as_trls_which_is_not():
    """Ratios 1 and 2 in one micro-batch, 6 in another: TRL's `val/ratio_var` would be that of 1.5 and 6."""
    updater = Updater(None, SimpleNamespace(reduce=lambda sums, reduction: sums), None, None, None)
    updater.grad_norms = []
    sums = {"val/ratio": 9.0, "val/token_ratio_var": 41.0, "tokens": 3.0}
    updater.sums = {name: torch.tensor(value) for name, value in sums.items()}
    assert updater._metrics() == {"val/ratio": 3.0, "val/token_ratio_var": pytest.approx(14 / 3)}
