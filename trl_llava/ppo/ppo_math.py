"""The formulae of PPO, as pure functions over padded responses.

Every function takes a `mask` of shape (B, R), `True` at the real tokens of a response: those up to and including its
first stop token. What stands at other positions never enters a result, and results are 0 there.

Letters: `B` batch, `R` response length.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over all processes; the identity where there is one."""


class ClippedLoss(NamedTuple):
    """A clipped PPO loss, token by token.

    Attributes:
        losses: (B, R) float; 0 at padding.
        clipped: (B, R) bool; `True` where the clipped branch was the larger one.
    """

    losses: torch.Tensor
    clipped: torch.Tensor


class PolicyTerms(NamedTuple):
    """The clipped policy loss together with the quantities it is made from.

    Attributes:
        losses: (B, R) float; 0 at padding.
        clipped: (B, R) bool; `True` where the clipped branch was the larger one.
        ratio: (B, R) float; new over old probability of each token, 1 at padding.
        log_ratio: (B, R) float; its logarithm, 0 at padding.
    """

    losses: torch.Tensor
    clipped: torch.Tensor
    ratio: torch.Tensor
    log_ratio: torch.Tensor


def one_process(total: torch.Tensor) -> torch.Tensor:
    """Return `total` unchanged: the sum over all processes where there is only one.

    Args:
        total: any tensor.

    Returns:
        The same tensor.
    """
    return total


def response_mask(responses: torch.Tensor, stop_token_id: int | None) -> torch.Tensor:
    """Mark the real tokens of each response: all up to and including its first stop token.

    Args:
        responses: (B, R) token ids.
        stop_token_id: id that ends a response, or `None` if nothing does.

    Returns:
        (B, R) bool, `True` at real tokens.
    """
    if stop_token_id is None:
        return torch.ones_like(responses, dtype=torch.bool)
    is_stop = (responses == stop_token_id).long()
    return is_stop.cumsum(1) - is_stop == 0


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum the values at real tokens, whatever (even NaN) stands at the others.

    Args:
        values: (B, R) float.
        mask: (B, R) bool, `True` at real tokens.

    Returns:
        Scalar.
    """
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = one_process) -> torch.Tensor:
    """Mean over the real tokens of all processes.

    Args:
        values: (B, R) float.
        mask: (B, R) bool, `True` at real tokens.
        reduce: sums a tensor over all processes.

    Returns:
        Scalar.

    Raises:
        ValueError: if no token is real.
    """
    count = reduce(mask.sum())
    if count == 0:
        raise ValueError("masked_mean: the mask has no real token, so there is no mean")
    return reduce(masked_sum(values, mask)) / count


def masked_whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    reduce: Reduce = one_process,
    variance: Literal["sample", "population"] = "sample",
) -> torch.Tensor:
    """Scale the real tokens' values to variance 1 and, unless told not to, mean 0.

    Args:
        values: (B, R) float.
        mask: (B, R) bool, `True` at real tokens.
        shift_mean: `False` keeps the mean.
        reduce: sums a tensor over all processes: the statistics are those of the whole rollout batch.
        variance: "sample" divides by the number of tokens minus 1 (TRL), "population" by their number (the paper).

    Returns:
        (B, R) float, 0 at padding.

    Raises:
        ValueError: if fewer than two tokens are real: then there is no variance.
    """
    count = reduce(mask.sum())
    if count < 2:
        raise ValueError(f"masked_whiten needs at least 2 real tokens, found {int(count)}: use a larger batch")
    mean = masked_mean(values, mask, reduce)
    degrees = count - 1 if variance == "sample" else count
    spread = reduce(masked_sum((values - mean) ** 2, mask)) / degrees
    whitened = (values - mean) * torch.rsqrt(spread + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))


def kl_per_token(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    estimator: Literal["k1", "k3"] = "k1",
    clamp: bool = False,
) -> torch.Tensor:
    """Estimate KL(policy || reference) at each sampled token.

    k1 is `log p - log q`; k3 is `q/p - 1 - log(q/p)` (http://joschu.net/blog/kl-approx.html). The paper clamps k1 at 0
    from below.

    Args:
        logprobs: (B, R) log-probabilities of the sampled tokens under the policy.
        ref_logprobs: (B, R) the same under the reference.
        mask: (B, R) bool, `True` at real tokens.
        estimator: "k1" or "k3".
        clamp: `True` sets negative k1 values to 0, as the paper does.

    Returns:
        (B, R) float in nats, 0 at padding.
    """
    log_ratio = torch.where(mask, ref_logprobs - logprobs, torch.zeros_like(logprobs))
    kl = -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio
    return kl.clamp(min=0) if clamp else kl


def last_real_token(mask: torch.Tensor) -> torch.Tensor:
    """Index of the last real token of each row.

    Args:
        mask: (B, R) bool, `True` at real tokens.

    Returns:
        (B,) long.

    Raises:
        ValueError: if a row has no real token.
    """
    if not bool(mask.any(dim=1).all()):
        rows = (~mask.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of the batch have an empty response: there is no last token")
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask).argmax(dim=1)


def shape_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float, scale: float = 1.0
) -> torch.Tensor:
    """Turn one score per response into a reward per token: `-kl_coef * kl`, plus the score at the last real token.

    Args:
        scores: (B,) float.
        kl: (B, R) float in nats, 0 at padding.
        mask: (B, R) bool, `True` at real tokens.
        kl_coef: weight of the KL penalty.
        scale: factor on the sum of both (the paper's code uses 10 when rewards are not whitened).

    Returns:
        (B, R) float, 0 at padding.
    """
    rewards = -kl_coef * kl
    rows = torch.arange(rewards.shape[0], device=rewards.device)
    rewards[rows, last_real_token(mask)] += scores.to(rewards.dtype)
    return scale * rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (https://arxiv.org/abs/1506.02438, equation 16).

    Episodes end at the last real token.

    Args:
        rewards: (B, R) float.
        values: (B, R) float; the value of the state before each token.
        mask: (B, R) bool, `True` at real tokens.
        gamma: discount.
        lam: lambda.

    Returns:
        advantages: (B, R) float, 0 at padding.
        returns: (B, R) float, advantages + values, 0 at padding.
    """
    values = torch.where(mask, values, torch.zeros_like(values))
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * lam * following, torch.zeros_like(following))
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, advantages + values


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float,
) -> PolicyTerms:
    """Clipped surrogate loss of PPO (https://arxiv.org/abs/1707.06347, equation 7), token by token.

    Args:
        logprobs: (B, R) log-probabilities of the sampled tokens under the policy as it is now.
        old_logprobs: (B, R) the same when they were sampled.
        advantages: (B, R) float.
        mask: (B, R) bool, `True` at real tokens.
        cliprange: largest move of the ratio from 1 that still earns anything.

    Returns:
        The losses and what they are made from.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    losses = torch.where(mask, torch.max(plain, clipped), torch.zeros_like(plain))
    return PolicyTerms(losses, (clipped > plain) & mask, ratio, log_ratio)


def importance_weights(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> torch.Tensor:
    """Truncated importance sampling as in TRL's GRPOTrainer, for tokens that another program has drawn.

    The weight is the token's probability under the policy over that under the program that drew it, or the same of the
    whole completion.

    Args:
        logprobs: (B, R) log-probabilities of the sampled tokens under the policy that was to draw them.
        sampling_logprobs: (B, R) the same as the program says; NaN where it says nothing, which leaves the weight 1.
        mask: (B, R) bool, `True` at real tokens.
        mode: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask": of each token or of the whole
            completion; moved to the limits where it lies outside, or 0 there.
        clip_min: lower limit; `None` sets none.
        clip_max: upper limit; `None` sets none.

    Returns:
        (B, R) weights of the tokens' policy losses, without gradient; those of a completion are equal in the
        "sequence" modes.
    """
    level, limit = mode.split("_")
    difference = torch.where(mask, logprobs - sampling_logprobs, torch.zeros_like(logprobs)).nan_to_num(nan=0.0)
    if level == "sequence":
        difference = difference.sum(1, keepdim=True).expand_as(difference)
    weights = difference.detach().exp()
    low, high = clip_min or 0.0, math.inf if clip_max is None else clip_max
    if limit == "truncate":
        return weights.clamp(low, high)
    return torch.where((low <= weights) & (weights <= high), weights, torch.zeros_like(weights))


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> ClippedLoss:
    """Half the squared error of the value, clipped around its value at rollout, token by token.

    Args:
        values: (B, R) values as they are now.
        old_values: (B, R) values at rollout.
        returns: (B, R) targets.
        mask: (B, R) bool, `True` at real tokens.
        cliprange: largest move from the old value that still earns anything.

    Returns:
        The losses, and where they were clipped.
    """
    moved = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    plain, clipped = (values - returns) ** 2, (moved - returns) ** 2
    losses = 0.5 * torch.where(mask, torch.max(plain, clipped), torch.zeros_like(plain))
    return ClippedLoss(losses, (clipped > plain) & mask)
