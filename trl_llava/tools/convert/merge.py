"""An adapter and its base as one model with dense weights, checked on a probe batch before it is kept.

    trl-llava merge ADAPTER DST

The weights have the dtype that the base is stored in. A base that is stored in 4 or 8 bits is refused unless
`--quantized` says that the sum shall be rounded to its few levels again.
"""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.batching import kind_tensors, text_tensors
from trl_llava.data.encoding import encode
from trl_llava.errors import InputError
from trl_llava.hub.lookup import check_there, find_file, local_base
from trl_llava.hub.names import split_revision
from trl_llava.models.adapters import load_adapter
from trl_llava.models.load import load_policy, load_processor, load_sequence_classifier
from trl_llava.prompts import Message
from trl_llava.rewards.reward_settings import SETTINGS_FILE
from trl_llava.run.atomic_files import whole_folder

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a logit that rounding may explain, as a share of the largest logit, by dtype."""

QUANTIZED_TOLERANCE = math.inf
"""Rounding to 4 bits may explain anything but NaN; the number is printed, and the user has allowed it."""


class MergeCheck(NamedTuple):
    """How far the merged model is from base and adapter on the probe batch, in logits (a reward model's scores)."""

    largest_difference: float
    largest_logit: float  # to compare it with
    adapter_effect: float  # largest difference that the adapter makes; 0 would mean that it does nothing
    dtype: torch.dtype  # of the merged weights


def merge(
    adapter: str,
    target: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    quantized: bool = False,
    tolerance: float | None = None,
) -> MergeCheck:
    """Merge an adapter into its base and save the sum with its processor.

    Args:
        adapter: Folder or Hub ID of a policy's or reward model's adapter.
        target: The new folder; it appears when all is written and checked.
        base: The base model; by default the one that adapter_config.json names.
        revision: Branch, tag or commit of the adapter.
        quantized: Merge into a base that is stored in 4 or 8 bits, which stays so.
        tolerance: Largest difference allowed, as a share of the largest logit; by default `TOLERANCE` of the dtype.

    Returns:
        The check's numbers.

    Raises:
        ValueError: If it is no adapter, the base is quantised and `quantized` is false, or the merged model computes
            something else.
    """
    adapter, revision = split_revision("the adapter", adapter, revision)
    check_there("the adapter", adapter, revision)
    if find_file(adapter, "adapter_config.json", revision) is None:
        raise InputError(f"'{adapter}' is no adapter: it has no adapter_config.json. A whole model needs no merging")
    config = PeftConfig.from_pretrained(adapter, revision=revision)
    named = local_base(adapter, config.base_model_name_or_path)
    if not (base or named):
        raise InputError(f"the adapter '{adapter}' does not name its base model. Name it with --base")
    field = "--base" if base else f"the base that adapter_config.json of {adapter} names (--base gives another)"
    base, base_revision = split_revision("--base", base) if base else (named, config.revision)
    base = check_there(field, base, base_revision)
    stored = AutoConfig.from_pretrained(base, revision=base_revision)
    if getattr(stored, "quantization_config", None) and not quantized:
        raise InputError(
            f"the base '{base}' is stored quantised: the merged weights would be rounded to its few levels. Name the "
            "dense model that it was made from with --base, or allow it with --quantized"
        )
    with whole_folder(target) as output:
        model = _load(adapter, base, str(config.task_type), base_revision, revision)
        own_files = find_file(adapter, "processor_config.json", revision) is not None
        processor = load_processor(adapter if own_files else base, revision=revision if own_files else base_revision)
        check, merged = _merge(model, processor, tolerance or (QUANTIZED_TOLERANCE if quantized else None))
        # transformers cannot rename quantised weights back to the names of older checkpoints.
        merged.save_pretrained(output, save_original_format=not quantized)
        processor.save_pretrained(output)
        settings = find_file(adapter, SETTINGS_FILE, revision)
        if settings is not None:
            _copy_settings(Path(settings), output)
    return check


def _load(adapter: str, base: str, task: str, base_revision: str | None, revision: str | None) -> PeftModel:
    """Base and adapter, in the dtype that the base is stored in, frozen."""
    arguments = LlavaModelConfig(model_name_or_path=base, model_revision=base_revision or "main", dtype="auto")
    if task == "SEQ_CLS":
        model = load_sequence_classifier(base, arguments, revision=base_revision)
    else:
        model = load_policy(arguments)
    return load_adapter(model, adapter, is_trainable=False, revision=revision).eval()


@torch.no_grad()
def _merge(model: PeftModel, processor: ProcessorMixin, tolerance: float | None) -> tuple[MergeCheck, PreTrainedModel]:
    """Merge, and compare the logits with those from before."""
    batch, mask = _probe(model, processor)
    before = _logits(model, batch, mask)
    with model.disable_adapter():
        bare = _logits(model, batch, mask)
    dtype = model.get_base_model().dtype
    merged = model.merge_and_unload(safe_merge=True)
    after = _logits(merged, batch, mask)
    check = MergeCheck(
        largest_difference=(after - before).abs().max().item(),
        largest_logit=before.abs().max().item(),
        adapter_effect=(before - bare).abs().max().item(),
        dtype=dtype,
    )
    share = TOLERANCE[dtype] if tolerance is None else tolerance
    # `not <=` also catches NaN.
    if not check.largest_difference <= share * max(check.largest_logit, 1.0):
        raise InputError(
            f"the merged model's logits differ by up to {check.largest_difference:.3g} (largest logit "
            f"{check.largest_logit:.3g}) from those of base and adapter, more than rounding to {dtype} explains; "
            "nothing was kept. --tolerance allows more"
        )
    return check, merged


def _probe(model: PeftModel, processor: ProcessorMixin) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two questions of different length, one about an image; where their real tokens are."""
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    texts = ("What is in the picture, from left to right?", "Name a colour.")
    contents = [[{"type": "text", "text": text}] for text in texts]
    contents[0].insert(0, {"type": "image"})
    questions: list[list[Message]] = [[{"role": "user", "content": content}] for content in contents]
    encoding = encode(processor, questions, [[image], []], add_generation_prompt=True)
    batch = text_tensors(processor, encoding.input_ids) | kind_tensors(encoding.token_kinds) | encoding.images.tensors
    dtype = model.get_base_model().dtype
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    return {name: value.to(model.device) for name, value in batch.items()}, batch["attention_mask"].bool()


def _logits(model: PeftModel | PreTrainedModel, batch: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The logits of every real token, or the scores; float32."""
    logits = model(**batch).logits.float().cpu()
    return logits[mask] if logits.dim() == 3 else logits


def _copy_settings(settings: Path, output: Path) -> None:
    """The judging prompt goes with the merged model, the pinned commit of a base that it no longer needs does not."""
    shutil.copyfile(settings, output / SETTINGS_FILE)
    values = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
    values["base_model_revision"] = None
    (output / SETTINGS_FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
