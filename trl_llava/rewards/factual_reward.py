"""The factual reward: a reward model that reads image, prompt, completion and captions of the image.

It is a reward function in TRL's sense, so PPO here and `GRPOTrainer` and `RLOOTrainer` there take it alike. The prompt
that the model was trained with, its captions' format and its image processor are saved with its adapter and head.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.batching import kind_tensors
from trl_llava.data.contract import check_captions, names_or_numbers, normalise_messages, place_images
from trl_llava.data.encoding import encode
from trl_llava.data.images import ImageRef, load_image
from trl_llava.data.prompt_groups import Conversation, same_prompts, split_images
from trl_llava.errors import InputError, NotFoundError
from trl_llava.hub.lookup import check_there, find_file, local_base, not_found
from trl_llava.hub.names import split_revision
from trl_llava.models.adapter_role import AdapterRole, in_eval_mode
from trl_llava.models.adapters import load_adapter
from trl_llava.models.base_model import base_of
from trl_llava.models.load import HEAD, load_processor, load_sequence_classifier
from trl_llava.models.micro_batches import Lengths, micro_batches
from trl_llava.models.model_inputs import ModelInputs, split_by_rows
from trl_llava.models.sequence_classification import ImageTextForSequenceClassification
from trl_llava.models.shared_base import SharedBase, add_role, find_shared_base
from trl_llava.models.shared_prefix import Grouped, common_prefix, pack_groups, why_not
from trl_llava.prompts import JudgingPrompt, Message, judging_messages
from trl_llava.rewards.reward_settings import read_settings, save_settings

AHEAD = 8
"""For how many full passes rows are encoded at once, so that those which run together are alike in length."""


class FactualReward:
    """Scores completions about images with a reward model; a callable with TRL's reward-function signature.

    Args:
        model: A `...ForSequenceClassification` with one label, with or without PEFT around it, or an adapter on
            another model's base.
        processing_class: The reward model's own processor; prompts come as messages, so policy and reward model may
            differ in family, size and image processor.
        judging_prompt: The turn behind the completion that the model was trained with; None scores the conversation
            itself, at the token that ends the completion.
        batch_size: Most completions in one pass.
        max_tokens: Most tokens in one pass, padding included; None: no limit.
        share_prefix: Run a prompt once for all of its completions, where the model's attention can.
        device: Where to move the model; None leaves it where it is.
        name: Name in the logs; two factual rewards in one run need two names.

    Raises:
        ValueError: If the model has no score head with one label, or does not fit the processor.

    Example:
        >>> reward = FactualReward.from_pretrained("org/llava-factual-rm")
        >>> prompt = {"role": "user", "content": "What is in the image?"}
        >>> completion = {"role": "assistant", "content": "A red square."}
        >>> scores = reward([[prompt]], [[completion]], images=[["red.png"]], captions=[["A red square."]])
        >>> len(scores)
        1

        In TRL's trainer: `GRPOTrainer(model, reward_funcs=reward, ...)`, with `images` and `captions` in the rows.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | AdapterRole,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        judging_prompt: JudgingPrompt | None,
        *,
        batch_size: int = 16,
        max_tokens: int | None = None,
        share_prefix: bool = True,
        device: torch.device | str | None = None,
        name: str = "factual_reward",
    ) -> None:
        _check_fit(model, processing_class)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, found {batch_size}")
        if device is not None and not getattr(model, "is_quantized", False):  # a quantised one is placed on loading
            model = model.to(device)
        packs = isinstance(base_of(model), ImageTextForSequenceClassification) and why_not(model) is None
        self.model = model
        self.processing_class = processing_class
        self.judging_prompt = judging_prompt
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.share_prefix = share_prefix and packs
        self.__name__ = name

    @property
    def needs_captions(self) -> bool:
        """Whether a row without captions cannot be scored."""
        return self.judging_prompt is not None and self.judging_prompt.with_captions

    def __call__(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        images: Sequence[Sequence[ImageRef] | ImageRef | None] | None = None,
        captions: Sequence[Sequence[str] | None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score one completion per row, in the order given.

        A row without captions, with an unreadable image, or with messages that do not fit its images is a `RowError`.

        Args:
            prompts: B conversations that end with a user turn.
            completions: B completions.
            images: The images of each row, none for a text-only row: decoded, paths, bytes, `{"bytes", "path"}`, or
                tensors and arrays of pixels, (3, H, W) or (H, W, 3), from 0 to 255 or fractions from 0 to 1.
                By default those inside the prompts' image parts, and a column `image` where there is one.
            captions: Captions of each row's images; needed if the judging prompt shows captions.
            **columns: `row_name` is used in errors, `image` as said; all others are ignored.

        Returns:
            B scores.
        """
        names = names_or_numbers(columns.get("row_name"), len(prompts))
        images = columns.get("image") if images is None else images
        nothing = [None] * len(prompts)
        given = (nothing if column is None else column for column in (images, captions))
        rows = list(zip(prompts, completions, *given, names, strict=True))
        scores: list[float] = []
        with in_eval_mode(self.model):
            for start in range(0, len(rows), AHEAD * self.batch_size):
                part = rows[start : start + AHEAD * self.batch_size]
                scores += self._score([self._judged_conversation(*row) for row in part], same_prompts(part))
        return scores

    def _judged_conversation(
        self, prompt: Conversation, completion: Conversation, images: Any, captions: Sequence[str] | None, name: str
    ) -> tuple[list[Message], list[Image.Image], str]:
        """The conversation that the model reads for one row, with the row's decoded images."""
        question, found = split_images(prompt, images, "user")
        answer, _ = split_images(completion, None, "assistant")
        decoded = [load_image(image, name) for image in found]
        conversation = place_images(normalise_messages(question, name), len(decoded), name)
        conversation += normalise_messages(answer, name, "completion")
        if self.judging_prompt is None:
            return conversation, decoded, name
        if self.needs_captions:
            check_captions(captions, name)
        return judging_messages(conversation, captions, self.judging_prompt), decoded, name

    def _score(self, rows: Sequence[tuple[list[Message], list[Image.Image], str]], groups: list[int]) -> list[float]:
        """Passes over rows that are alike in length; those of a group have one prompt and the same images."""
        conversations, images, names = zip(*rows, strict=True)
        judged = self.judging_prompt is not None
        encoding = encode(
            self.processing_class,
            conversations,
            images,
            row_names=names,
            continue_final_message=judged,
            judging_turn=judged,
        )
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        ids = [torch.tensor(row) for row in encoding.input_ids]
        device = self.model.device
        inputs = ModelInputs(
            pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left").to(device),
            pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left").to(device),
            split_by_rows(encoding.images.tensors, encoding.images.counts),
            {name: kinds.to(device) for name, kinds in kind_tensors(encoding.token_kinds, side="left").items()},
        )
        packs = groups if self.share_prefix and not inputs.tokens else None
        lengths = _lengths(encoding.input_ids, packs)
        scores = torch.zeros(len(rows))
        with torch.inference_mode():
            for part in micro_batches(range(len(rows)), lengths, self.batch_size, self.max_tokens, None):
                own = [encoding.input_ids[row] for row in part]
                together = None if packs is None else pack_groups(own, [packs[row] for row in part])
                scores[part] = self._pass(inputs.select(part), together).cpu()
        return scores.tolist()

    def _pass(self, inputs: ModelInputs, together: Grouped | None) -> torch.Tensor:
        """(B,) float32: the scores of B rows, as they are or packed by prompt."""
        places = list(range(len(inputs)))
        given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, **inputs.tokens}
        if together is not None:
            places = together.places
            given = {name: value.to(self.model.device) for name, value in together.packed._asdict().items()}
            inputs = inputs.select(together.first)
        # No token follows: keys and values of all layers would only take memory.
        logits = self.model(**given, **inputs.image_kwargs(), use_cache=False).logits
        return logits.squeeze(-1)[places].float()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all that `from_pretrained` needs: adapter with head (or model), processor and judging prompt.

        Args:
            folder: Made if it is not there.
        """
        self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        save_settings(folder, self.judging_prompt, self.model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        judging_prompt: JudgingPrompt | None = None,
        base_model: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        model_args: LlavaModelConfig | None = None,
        device: torch.device | str | None = None,
        shared: Sequence[SharedBase] = (),
        **settings: Any,
    ) -> "FactualReward":
        """Load a reward model together with the prompt, caption format and image processor it was trained with.

        A checkpoint without its prompt, processor or head, or with another prompt than the one given, is a
        `ValueError`.

        Args:
            name: Hub ID or folder: what stage 2 or `save_pretrained` has written.
            judging_prompt: For a checkpoint without factual_reward.json only: what the model was trained with.
            base_model: Base of an adapter; by default the one its adapter_config.json names.
            revision: Branch, tag or commit of `name`.
            dtype: "float32", "bfloat16", ..., or "auto" for that of the checkpoint (of an adapter: its base).
            model_args: In place of `dtype`: dtype, attention implementation, quantisation and `trust_remote_code`.
            device: Where it computes; by default this process's GPU if there is one.
            shared: Loaded models, one of whose bases an adapter may use instead of a copy.
            **settings: `batch_size`, `max_tokens`, `share_prefix` and `name`, as for the class.

        Returns:
            The reward.

        Raises:
            OSError: If there is no such model.
        """
        model_args = LlavaModelConfig(dtype=dtype) if model_args is None else model_args
        name, revision = split_revision("reward model", os.fspath(name), revision)
        check_there("reward model", name, revision)
        expected = ("adapter_config.json", "config.json")
        files = {file: find_file(name, file, revision) for file in expected}
        if not any(files.values()):
            nothing = FileNotFoundError(f"it has none of {', '.join(expected)}")
            raise NotFoundError(not_found("reward model", name, revision, nothing))
        saved = read_settings(name, judging_prompt, revision=revision)
        if files["adapter_config.json"]:
            config = PeftConfig.from_pretrained(name, revision=revision)
            base, base_revision = local_base(name, config.base_model_name_or_path) or "", saved.base_model_revision
            base_revision = base_revision or config.revision
            field = f"the base that adapter_config.json of {name} names (`base_model`, or --base, gives another)"
            if base_model:
                (base, base_revision), field = split_revision("base_model", base_model), "base_model"
            loaded = find_shared_base(shared, "reward model", name, base, base_revision, revision)
            if loaded is not None:
                model = add_role(loaded, name, "reward_role", is_trainable=False, revision=revision, new_head=False)
            else:
                base = check_there(field, base, base_revision)
                model = load_sequence_classifier(base, model_args, revision=base_revision)
                model = load_adapter(model, name, is_trainable=False, revision=revision)
        else:
            model = load_sequence_classifier(name, model_args, revision=revision, new_head=False)
        remote = model_args.trust_remote_code
        processor = load_processor(name, revision=revision, trust_remote_code=remote, field="reward model")
        if not isinstance(model, AdapterRole):
            model.requires_grad_(False)
        device = PartialState().device if device is None else device
        return cls(model, processor, saved.judging_prompt, device=device, **settings)


def _check_fit(
    model: PreTrainedModel | PeftModel | AdapterRole, processing_class: ProcessorMixin | PreTrainedTokenizerBase
) -> None:
    """Raise for a model that gives no scores, or that reads the processor's tokens as others."""
    base = base_of(model)
    labels = base.num_labels if isinstance(base, AdapterRole) else base.config.num_labels
    if not hasattr(base, HEAD) or labels != 1:
        raise InputError(
            f"{type(base).__name__} gives no single score (num_labels={labels}, expected a head "
            f"`{HEAD}` with 1). Load it with load_sequence_classifier, or FactualReward.from_pretrained"
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    # Gemma 3's processor calls the token in front of an image its image token, and tells those that a model replaces.
    image_tokens = getattr(processing_class, "image_token_ids", [getattr(processing_class, "image_token_id", None)])
    ids = {
        "image_token_id": (getattr(base.config, "image_token_id", None), *image_tokens),
        "vocabulary size": (base.get_input_embeddings().num_embeddings, len(tokenizer)),
    }
    if ids["image_token_id"][0] not in image_tokens or ids["vocabulary size"][0] < ids["vocabulary size"][1]:
        raise InputError(
            f"the reward model '{base.name_or_path}' and its processor do not fit together: (model, processor) have "
            + ", ".join(f"{what} {pair}" for what, pair in ids.items())
            + ". Use the processor that was saved with the reward model"
        )


def _lengths(rows: Sequence[list[int]], groups: list[int] | None) -> Lengths:
    """Lengths of rows for micro-batches; what the rows of a group share runs once."""
    if groups is None:
        return Lengths([len(row) for row in rows], [0] * len(rows))
    members: dict[int, list[list[int]]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row)
    shared = {group: common_prefix(own) for group, own in members.items()}
    prompts = [shared[group] for group in groups]
    return Lengths(prompts, [len(row) - prompt for row, prompt in zip(rows, prompts, strict=True)], groups)
