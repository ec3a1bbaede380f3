"""Passes over a rollout: log-probabilities and values, each computed in one place for every phase.

A pass needs no attention mask: prompt and response stand side by side at the left of their row.

Letters: `B` batch, `Q` query length (image tokens included), `R` response length, `L` sequence, `H` hidden, `n` real
response tokens.
"""

import copy

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import noop_context_fn
from transformers import PreTrainedModel

from trl_llava.errors import InputError
from trl_llava.models.adapter_role import AdapterRole, computing
from trl_llava.models.adapter_switching import SwitchedLayer, checkpoint_contexts
from trl_llava.models.base_model import backbone_of, base_of
from trl_llava.models.chunked_head import Sampling, capped, token_statistics
from trl_llava.models.families import family_of
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.positions import derives_positions
from trl_llava.models.shared_prefix import attention_mask_for, pack, predictors
from trl_llava.ppo.rollout import Rollout


def response_logprobs(
    policy: nn.Module,
    inputs: ModelInputs,
    responses: torch.Tensor,
    mask: torch.Tensor,
    sampling: Sampling,
    *,
    entropies: bool = False,
    share_prefix: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the response tokens, and the entropies of what each was drawn from.

    The head, the widest layer, runs where a real response token is predicted, a chunk of them at a time.

    Args:
        policy: a model with a language-modelling head, or a PEFT model around one.
        inputs: B prompts.
        responses: (B, R) token ids.
        mask: (B, R) bool, `True` at real tokens.
        sampling: temperature, tokens that are never drawn, and how many positions the head runs on at once.
        entropies: whether they are wanted; they carry no gradient.
        share_prefix: whether rows with the same prompt run as one.

    Returns:
        logprobs: (B, R) float32, 0 at padding.
        entropies: (B, R) float32, 0 at padding and where they are not wanted.
    """
    with computing(policy) as base:
        states = _states(base, inputs, responses, mask, share_prefix)
        head = base.get_output_embeddings()
        # A head with an adapter runs again, in the backward pass, when another role's adapter may be active.
        contexts = checkpoint_contexts(policy) if isinstance(head, SwitchedLayer) else noop_context_fn
        cap = logit_cap(base)
        found = token_statistics(
            states, head, responses[mask], sampling, entropies=entropies, cap=cap, context_fn=contexts
        )
    return _at_tokens(found[0], mask), _at_tokens(found[1], mask) if entropies else torch.zeros_like(mask).float()


def response_values(
    value_model: nn.Module,
    inputs: ModelInputs,
    responses: torch.Tensor,
    mask: torch.Tensor,
    *,
    share_prefix: bool = False,
) -> torch.Tensor:
    """The value of the state before each response token: (B, R) float32, 0 at padding.

    It is the head on the hidden state of the token before. `value_model` is a `...ForSequenceClassification` with one
    label, a PEFT model around one, or a role on another model's base; arguments else as for `response_logprobs`.
    """
    with computing(value_model) as base:
        states = _states(base, inputs, responses, mask, share_prefix)
        return _at_tokens(base.score(states.to(base.score.weight.dtype)).squeeze(-1).float(), mask)


def _states(
    base: nn.Module, inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor, share_prefix: bool
) -> torch.Tensor:
    """(n, H) the hidden states that the n real response tokens are predicted from, row by row; no head runs."""
    backbone = backbone_of(base)
    if share_prefix and inputs.can_be_packed:
        return _packed_states(backbone, inputs, responses, mask)
    kind = completion_kind(base)
    tokens, attention_mask, before = _left_aligned(inputs, responses, mask, kind)
    if derives_positions(base) or inputs.tokens:
        tokens["attention_mask"] = attention_mask
    # Else none: a causal model's real tokens do not see what is behind them, and without a mask attention has kernels
    # that do half the work and hold no (L, L) matrix.
    hidden = backbone(**inputs.image_kwargs(), **tokens, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[before]


def _left_aligned(
    inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor, kind: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Prompt and response of each row without a gap, all padding behind them.

    `kind` is that of a response's tokens, where tokens have kinds. Returns (B, L) `input_ids` with the kinds, the
    (B, L) attention mask, and (n,) the place of the token before each real response token among the B * L.
    """
    real = torch.cat((inputs.attention_mask.bool(), mask), 1)
    width = int(real.sum(1).max())
    order = (~real).long().argsort(dim=1, stable=True)[:, :width]
    attention_mask = real.long().gather(1, order)
    # Padding becomes id 0: a pad id may lie outside of the embedding.
    tokens = {"input_ids": torch.cat((inputs.input_ids, responses), 1).gather(1, order) * attention_mask}
    for name, value in inputs.tokens.items():
        tokens[name] = torch.cat((value, torch.full_like(responses, kind)), 1).gather(1, order)
    starts = inputs.attention_mask.sum(1) + width * torch.arange(len(inputs), device=mask.device)
    before = starts.unsqueeze(1) + torch.arange(-1, mask.shape[1] - 1, device=mask.device)
    return tokens, attention_mask, before[mask]


def _packed_states(
    backbone: nn.Module, inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """(n, H) as `_states`, with each prompt in the batch once, followed by all of its responses."""
    packs: dict[int, list[int]] = {}
    for row, group in enumerate(inputs.groups):
        packs.setdefault(group, []).append(row)
    first = [rows[0] for rows in packs.values()]
    packed = pack(
        [inputs.input_ids[row][inputs.attention_mask[row].bool()] for row in first],
        [[responses[row][mask[row]] for row in rows] for rows in packs.values()],
    )
    hidden = backbone(
        **inputs.select(first).image_kwargs(),
        input_ids=packed.input_ids,
        attention_mask=attention_mask_for(backbone, packed.segments),
        position_ids=packed.position_ids,
        use_cache=False,
    ).last_hidden_state
    found = predictors(packed, [len(rows) for rows in packs.values()])
    by_row = dict(zip((row for rows in packs.values() for row in rows), found, strict=True))
    return hidden.flatten(0, 1)[torch.cat([by_row[row] for row in range(len(inputs))])]


def _at_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put (n,) numbers at the n real tokens of a (B, R) mask, and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def check_plain_head(policy: nn.Module) -> None:
    """Refuse a policy that does more with its logits than its head and its cap say: `response_logprobs` would not."""
    base = base_of(policy)
    ids = torch.tensor([[1, 2]], device=base.device)  # not 0, whose embedding may be 0 for padding
    with torch.no_grad():
        whole = policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        states = backbone_of(base)(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).last_hidden_state
        found = capped(base.get_output_embeddings()(states), logit_cap(base))
    if not torch.allclose(found.float(), whole.logits.float(), rtol=1e-2, atol=1e-3):
        raise InputError(
            f"{type(base).__name__} does more with its logits than its head does (scales them), which PPO's chunked "
            "head does not follow. Use a policy of another family"
        )


def logit_cap(base: nn.Module) -> float | None:
    """What a model's logits stay below, if it caps them."""
    config = backbone_of(base).config
    family = family_of(config)
    if family is None or not family.caps_logits:
        return None
    return config.get_text_config().final_logit_softcapping


def completion_kind(base: nn.Module) -> int:
    """The kind of a completion's tokens, for models whose processor gives each token one."""
    family = family_of(backbone_of(base).config)
    return int(family is not None and family.attends_to_whole_prompt)


class PolicyAndValue(nn.Module):
    """Policy and value under one roof, so that `accelerate` prepares and synchronises both as one model.

    Differs from TRL's wrapper in that each has inputs of its own: a value model with another vision tower sees other
    image tokens.
    """

    def __init__(
        self, policy: PreTrainedModel | PeftModel, value_model: PreTrainedModel | PeftModel | AdapterRole
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.config = copy.copy(policy.config)  # Trainer writes its `use_cache` here, which shall not be saved
        # TRL asks before it generates; rollouts run in eval mode, where transformers does not checkpoint.
        self.is_gradient_checkpointing = False

    def forward(
        self, rollout: Rollout, sampling: Sampling, share_prefix: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, R) float32 log-probabilities, entropies (without gradient) and values of a rollout; 0 at padding."""
        responses = (rollout.responses, rollout.mask)
        logprobs, entropies = response_logprobs(
            self.policy, rollout.inputs, *responses, sampling, entropies=True, share_prefix=share_prefix
        )
        values = response_values(self.value_model, rollout.value_inputs, *responses, share_prefix=share_prefix)
        return logprobs, entropies, values
