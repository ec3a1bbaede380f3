"""Image-text models with a score head instead of a language-model head: the reward and the value model.

They differ from transformers' own `...ForSequenceClassification` in three things: the head has a bias, as the paper's
has; the pooled token is the last one whose attention mask is 1, under any padding side, never a guess by pad ID (a
completion may end in a token that is also the pad token); and a batch that stacks several texts of the same images
encodes each image once (`image_copies`).

Importing this module registers the classes with `AutoModelForSequenceClassification`, so that
`trl.RewardTrainer(model="org/name")` finds them.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3PreTrainedModel,
    Idefics3Config,
    Idefics3PreTrainedModel,
    InternVLConfig,
    InternVLPreTrainedModel,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextPreTrainedModel,
    LlavaOnevisionConfig,
    LlavaOnevisionPreTrainedModel,
    LlavaPreTrainedModel,
    PaliGemmaConfig,
    PaliGemmaPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLPreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLPreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLPreTrainedModel,
    SmolVLMConfig,
    SmolVLMPreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from trl_llava.models.families import GRID, family_of
from trl_llava.models.positions import position_kwargs
from trl_llava.models.shared_prefix import attention_mask_for, last_of_rests

if TYPE_CHECKING:  # what a mixin's methods may expect of `self`
    from transformers import PreTrainedModel as _Mixin
else:
    _Mixin = object


def last_token_index(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B,) int64 index of each row's last real token, from a (B, L) mask padded on any side; 0 for a row without one.

    >>> last_token_index(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]))
    tensor([1, 3])
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask.bool()).argmax(dim=1)


class ImageTextForSequenceClassification(_Mixin):
    """Mixin that turns a family's `...PreTrainedModel` into a model with a score head on the last real token.

    `model` is the family's headless model (tower, projector, language model) and `score` the head, the names that
    TRL reaches for; `score` may be called on the hidden states of every position, which is how a value model is read.
    """

    base_model_prefix = "model"
    # A checkpoint of the family's generation model has this and nothing else that we have not.
    _keys_to_ignore_on_load_unexpected = (r"lm_head\.weight",)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = AutoModel.from_config(config)
        self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_copies: int = 1,
        segments: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Score the last real token of each row.

        Args:
            input_ids: (B, L) token IDs, image tokens expanded.
            attention_mask: (B, L) int or bool, 1/True at real tokens. May be left out for a batch of one row, which
                then has no padding.
            position_ids: (B, L); by default counted over the real tokens, or what the family makes of its images.
            inputs_embeds: (B, L, H) instead of `input_ids`.
            pixel_values: The images of the first B / `image_copies` rows, as the image processor returns them.
            mm_encoder_outputs: Image features computed earlier, `{"image": ...}`, instead of `pixel_values`.
            image_copies: How many times the batch repeats the same images: 2 for B/2 chosen rows followed by the B/2
                rejected ones. Each image is encoded once.
            segments: (B, L) where each row holds several that share their beginning, as `shared_prefix.pack` lays them
                out; with its `position_ids`.
            labels: (B,) targets, for a loss by `config.problem_type`.
            **kwargs: Handed on to the headless model: what else the processor makes (`image_sizes`, `image_grid_thw`,
                `token_type_ids`, ...), `output_hidden_states`. No token follows, so `use_cache` is `False` by default.

        Returns:
            `logits` (B, num_labels) in the head's dtype, and `loss` if there are labels. With `segments` of S rests a
            row, (S * B, num_labels): all first rests, then all second ones.

        Raises:
            ValueError: If there are no inputs, or a batch of several rows comes without an attention mask, or B does
                not divide by `image_copies`.
        """
        _check_batch(input_ids if input_ids is not None else inputs_embeds, attention_mask, image_copies)
        if image_copies > 1:
            given = {"pixel_values": pixel_values, "mm_encoder_outputs": mm_encoder_outputs, **kwargs}
            kwargs = copied_images(self.model, given, image_copies)
            pixel_values, mm_encoder_outputs = kwargs.pop("pixel_values", None), kwargs.pop("mm_encoder_outputs", None)
        if position_ids is None and attention_mask is not None:
            position_ids = position_kwargs(self, attention_mask).get("position_ids")
        if mm_encoder_outputs is not None:  # not every family's forward knows it
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask if segments is None else attention_mask_for(self, segments),
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            return_dict=True,
            **{"use_cache": False, **kwargs},
        )
        hidden = outputs.last_hidden_state
        pooled = _pooled(hidden, attention_mask) if segments is None else _ends_of_rests(hidden, segments)
        logits = self.score(pooled.to(self.score.weight.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def copied_images(backbone: nn.Module, given: dict[str, Any], copies: int) -> dict[str, Any]:
    """Keyword arguments of a batch that repeats its rows, out of those with each image once.

    Each image is encoded once where the family is known; else its tensors are repeated, and it is encoded as often.
    """
    taken = inspect.signature(backbone.get_image_features).parameters
    images = {name: value for name, value in given.items() if name in taken and value is not None}
    rest = {name: value for name, value in given.items() if name not in images and value is not None}
    if family_of(backbone.config) is None:
        return {**rest, **{name: torch.cat([value] * copies) for name, value in images.items()}}
    encoded = rest.pop("mm_encoder_outputs", {}).get("image")
    if encoded is None and "pixel_values" in images:
        encoded = backbone.get_image_features(**images, return_dict=True)
    if GRID in images:  # positions are made of it too
        rest[GRID] = torch.cat([images[GRID]] * copies)
    return rest if encoded is None else {**rest, "mm_encoder_outputs": {"image": _repeated(encoded, copies)}}


def _repeated(encoded: BaseModelOutputWithPooling, copies: int) -> BaseModelOutputWithPooling:
    """The features of images, in the family's own form, as often as the batch repeats its rows; lists copy nothing."""
    features = encoded.pooler_output
    stacked = isinstance(features, torch.Tensor)
    repeated = BaseModelOutputWithPooling(
        pooler_output=torch.cat([features] * copies) if stacked else [*features] * copies
    )
    if (deeper := getattr(encoded, "deepstack_features", None)) is not None:
        repeated.deepstack_features = [[*layer] * copies for layer in deeper]
    return repeated


def _check_batch(given: torch.Tensor | None, attention_mask: torch.Tensor | None, image_copies: int) -> None:
    """Raise for a batch that `forward` cannot score; `given` are its (B, L) ids or (B, L, H) embeddings."""
    if given is None:
        raise ValueError("input_ids and inputs_embeds are both missing; pass one of them")
    rows = len(given)
    if attention_mask is None and rows > 1:
        raise ValueError(
            f"attention_mask is missing for a batch of {rows} rows: the IDs do not say which token of a padded row is "
            "the last real one. Pass the attention mask that the collator made"
        )
    if rows % image_copies:
        raise ValueError(
            f"image_copies={image_copies} does not divide the batch of {rows} rows: the batch must stack the rows "
            "of the same images, e.g. all chosen, then all rejected"
        )


def _pooled(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, H) of each row's last real token, from (B, L, H); without a mask there is no padding."""
    if attention_mask is None:
        return hidden_states[:, -1]
    last = last_token_index(attention_mask).to(hidden_states.device)
    return hidden_states[torch.arange(len(last), device=hidden_states.device), last]


def _ends_of_rests(hidden_states: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The (S * B, H) hidden states where the S rests of each row end: all first rests, then all second ones."""
    last = last_of_rests(segments)
    return hidden_states[torch.arange(len(segments), device=last.device), last].flatten(0, 1)


class LlavaForSequenceClassification(ImageTextForSequenceClassification, LlavaPreTrainedModel):
    """LLaVA-1.5, or a LLaVA with a Pixtral tower, with a score head."""


class LlavaNextForSequenceClassification(ImageTextForSequenceClassification, LlavaNextPreTrainedModel):
    """LLaVA-NeXT (1.6) with a score head."""


class LlavaOnevisionForSequenceClassification(ImageTextForSequenceClassification, LlavaOnevisionPreTrainedModel):
    """LLaVA-OneVision with a score head."""


class Qwen2VLForSequenceClassification(ImageTextForSequenceClassification, Qwen2VLPreTrainedModel):
    """Qwen2-VL with a score head."""


class Qwen2_5_VLForSequenceClassification(ImageTextForSequenceClassification, Qwen2_5_VLPreTrainedModel):
    """Qwen2.5-VL with a score head."""


class Qwen3VLForSequenceClassification(ImageTextForSequenceClassification, Qwen3VLPreTrainedModel):
    """Qwen3-VL with a score head."""


class InternVLForSequenceClassification(ImageTextForSequenceClassification, InternVLPreTrainedModel):
    """InternVL with a score head."""


class SmolVLMForSequenceClassification(ImageTextForSequenceClassification, SmolVLMPreTrainedModel):
    """SmolVLM with a score head."""


class Idefics3ForSequenceClassification(ImageTextForSequenceClassification, Idefics3PreTrainedModel):
    """Idefics3 with a score head."""


class Gemma3ForSequenceClassification(ImageTextForSequenceClassification, Gemma3PreTrainedModel):
    """Gemma 3 with a score head; transformers' own has no bias and guesses the last token by its id."""


class PaliGemmaForSequenceClassification(ImageTextForSequenceClassification, PaliGemmaPreTrainedModel):
    """PaliGemma with a score head."""


def _register(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    model_class.config_class = config_class
    # Without exist_ok, `register` returns silently for a config that transformers owns.
    AutoModelForSequenceClassification.register(config_class, model_class, exist_ok=True)
    if AutoModelForSequenceClassification._model_mapping._extra_content.get(config_class) is not model_class:
        # transformers 5.17, the newest that vLLM takes, returns silently with exist_ok too.
        AutoModelForSequenceClassification._model_mapping._extra_content[config_class] = model_class
    # The checkpoints on the Hub name their weights `language_model.model.*` and the like; transformers renames them by
    # class or model type, but only for its own classes. With the mapping ours are saved under those names too, and
    # adapters that were trained when the modules had those names load.
    names = (AutoModelForImageTextToText._model_mapping[config_class].__name__, config_class.model_type)
    mapping = next(filter(None, map(get_checkpoint_conversion_mapping, names)), None)
    if mapping is not None:
        register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)


for _config_class, _model_class in {
    LlavaConfig: LlavaForSequenceClassification,
    LlavaNextConfig: LlavaNextForSequenceClassification,
    LlavaOnevisionConfig: LlavaOnevisionForSequenceClassification,
    Qwen2VLConfig: Qwen2VLForSequenceClassification,
    Qwen2_5_VLConfig: Qwen2_5_VLForSequenceClassification,
    Qwen3VLConfig: Qwen3VLForSequenceClassification,
    InternVLConfig: InternVLForSequenceClassification,
    SmolVLMConfig: SmolVLMForSequenceClassification,
    Idefics3Config: Idefics3ForSequenceClassification,
    Gemma3Config: Gemma3ForSequenceClassification,
    PaliGemmaConfig: PaliGemmaForSequenceClassification,
}.items():
    _register(_config_class, _model_class)
