"""Passes over a rollout: image features, log-probabilities and values, each computed in one place for every phase.

Letters: `B` batch, `Q` query length (image tokens included), `R` response length, `L` sequence, `V` vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import selective_log_softmax

from trl_llava.rollout import ModelInputs, Rollout
from trl_llava.vision_tower import PROJECTOR_NAMES, TOWER_NAMES


def encode_images(model: nn.Module, inputs: ModelInputs, batch_size: int) -> ModelInputs:
    """Run tower and projector once for every image of a rollout, if nothing in them is trained.

    The features then serve generation, log-probabilities, values and every epoch of the update.

    Args:
        model: a LLaVA, with a language-modelling or a score head, or a PEFT model around one; unwrapped.
        inputs: B prompts with I images.
        batch_size: how many images run at once.

    Returns:
        Inputs with features in place of pixels; `inputs` as they are if there is no image, if tower or projector are
        trained, or if the model takes no encoded images.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = getattr(base, base.base_model_prefix)
    if "pixel_values" not in inputs.extras or not _takes_encoded_images(backbone) or _sees_with_trained_parts(base):
        return inputs
    taken = set(inspect.signature(backbone.get_image_features).parameters) & set(inputs.extras)
    features: list[torch.Tensor] = []
    with torch.no_grad():
        for rows in _rows_by_images(inputs.images_per_row, batch_size):
            part = inputs.select(rows).extras
            output = backbone.get_image_features(**{key: part[key] for key in taken}, return_dict=True)
            features.extend(output.pooler_output)
    extras = {key: value for key, value in inputs.extras.items() if key not in taken}
    return replace(inputs, extras=extras, image_features=features)


def _takes_encoded_images(backbone: nn.Module) -> bool:
    return "mm_encoder_outputs" in inspect.signature(backbone.forward).parameters


def _sees_with_trained_parts(model: nn.Module) -> bool:
    seeing = {*TOWER_NAMES, *PROJECTOR_NAMES}
    return any(p.requires_grad and seeing & set(name.split(".")) for name, p in model.named_parameters())


def _rows_by_images(images_per_row: list[int], batch_size: int) -> Iterator[list[int]]:
    """Consecutive rows with images, in groups of at most `batch_size` images (or one row that has more)."""
    group: list[int] = []
    for row, count in enumerate(images_per_row):
        if group and sum(images_per_row[i] for i in group) + count > batch_size:
            yield group
            group = []
        if count:
            group.append(row)
    if group:
        yield group


def position_kwargs(model: nn.Module, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Position ids that count real tokens only, for models that take plain ones.

    Args:
        model: the model that will run.
        attention_mask: (B, L).

    Returns:
        `{"position_ids": (B, L)}`, or nothing for a model that derives its own multimodal positions.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if any(hasattr(part, "get_rope_index") for part in (base, getattr(base, base.base_model_prefix, base))):
        return {}
    return {"position_ids": attention_mask.cumsum(1) - attention_mask}


def response_logits(
    policy: nn.Module,
    inputs: ModelInputs,
    responses: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    suppressed: Sequence[int] = (),
) -> torch.Tensor:
    """Logits of the distribution each response token was drawn from.

    Args:
        policy: a model with a language-modelling head.
        inputs: the prompts.
        responses: (B, R) token ids.
        mask: (B, R) bool, `True` at real tokens.
        temperature: sampling temperature; the logits are divided by it.
        suppressed: ids that generation never draws, such as the image token.

    Returns:
        (B, R, V) float32.
    """
    kwargs = inputs.followed_by(responses, mask)
    kwargs.update(position_kwargs(policy, kwargs["attention_mask"]))
    # The head is the widest layer: it runs where a response token is predicted, and nowhere else.
    output = policy(**kwargs, logits_to_keep=responses.shape[1] + 1, use_cache=False)
    logits = output.logits[:, -responses.shape[1] - 1 : -1].float() / (temperature + 1e-7)
    if suppressed:
        blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        blocked[[token for token in suppressed if token < logits.shape[-1]]] = True
        # The smallest finite number rather than -inf: probability 0, and no 0 * inf in the entropy.
        logits = logits.masked_fill(blocked, torch.finfo(logits.dtype).min)
    return logits


def token_logprobs(logits: torch.Tensor, responses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the response tokens.

    Args:
        logits: (B, R, V).
        responses: (B, R) token ids.
        mask: (B, R) bool, `True` at real tokens.

    Returns:
        (B, R) float, 0 at padding.
    """
    logprobs = selective_log_softmax(logits, responses.masked_fill(~mask, 0))
    return torch.where(mask, logprobs, torch.zeros_like(logprobs))


def token_entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each distribution.

    Args:
        logits: (B, R, V).

    Returns:
        (B, R) float in nats.
    """
    return torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)


def response_values(
    value_model: nn.Module, inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The value of the state before each response token: the head on the hidden state of the token before it.

    Args:
        value_model: a `...ForSequenceClassification` with one label, or a PEFT model around one.
        inputs: the prompts as this model sees them.
        responses: (B, R) token ids.
        mask: (B, R) bool, `True` at real tokens.

    Returns:
        (B, R) float32; what stands at padding means nothing.
    """
    model = value_model.get_base_model() if isinstance(value_model, PeftModel) else value_model
    kwargs = inputs.followed_by(responses, mask)
    kwargs.update(position_kwargs(model, kwargs["attention_mask"]))
    hidden = getattr(model, model.base_model_prefix)(**kwargs, use_cache=False).last_hidden_state
    return model.score(hidden[:, -responses.shape[1] - 1 : -1]).squeeze(-1).float()


class PolicyAndValue(nn.Module):
    """Policy and value under one roof, so that `accelerate` prepares and synchronises both as one model.

    Differs from TRL's wrapper in that each has inputs of its own: a value model with another vision tower sees other
    image tokens.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, value_model: PreTrainedModel | PeftModel) -> None:
        """Wrap both; nothing is copied.

        Args:
            policy: the model that answers.
            value_model: the model that predicts what an answer will earn.
        """
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.config = policy.config
        # TRL asks before it generates; rollouts run in eval mode, where transformers does not checkpoint.
        self.is_gradient_checkpointing = False

    def forward(
        self, rollout: Rollout, temperature: float, suppressed: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run both over a rollout.

        Args:
            rollout: B rows.
            temperature: sampling temperature.
            suppressed: ids that generation never draws.

        Returns:
            logits: (B, R, V) float32.
            values: (B, R) float32.
        """
        logits = response_logits(self.policy, rollout.inputs, rollout.responses, rollout.mask, temperature, suppressed)
        return logits, response_values(self.value_model, rollout.value_inputs, rollout.responses, rollout.mask)
