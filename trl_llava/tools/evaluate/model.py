"""A model that answers, with its own chat template: of a run, a checkpoint, an adapter or a whole model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, ProcessorMixin
from transformers.generation import BaseStreamer

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.collators import PromptCollator
from trl_llava.errors import InputError
from trl_llava.hub.lookup import check_there, find_file
from trl_llava.hub.names import split_revision
from trl_llava.models.adapters import load_adapter
from trl_llava.models.base_model import base_of
from trl_llava.models.load import load_policy, load_processor
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.starts import adapter_base
from trl_llava.ppo.generation import neutral_generation_config, suppressed_tokens
from trl_llava.ppo.randomness import RowNoise, row_keys
from trl_llava.rewards.reward_settings import SETTINGS_FILE
from trl_llava.run.checkpoint_folders import checkpoints

Row = dict[str, Any]


def question_row(name: str, question: str, images: Sequence[Any]) -> Row:
    """A row of the prompt stage that asks one question about images, which stand in front of it."""
    content = [*({"type": "image", "text": None} for _ in images), {"type": "text", "text": question}]
    return {"row_name": name, "images": list(images), "prompt": [{"role": "user", "content": content}]}


def model_config(
    dtype: str, *, load_in_4bit: bool, attn_implementation: str | None, trust_remote_code: bool, **named: Any
) -> LlavaModelConfig:
    """How a model is loaded; in 4 bit, one whose dtype is "auto" computes in bfloat16. `named` are further fields."""
    config = LlavaModelConfig(
        dtype="bfloat16" if load_in_4bit and dtype == "auto" else dtype,
        load_in_4bit=load_in_4bit,
        attn_implementation=attn_implementation,
        **named,
    )
    config.trust_remote_code = trust_remote_code
    return config


@dataclass(frozen=True)
class Decoding:
    """How completions are made: greedy at temperature 0, else draws that depend on seed and row alone."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """One completion."""

    text: str
    tokens: int  # with the one that ends it
    finished: bool  # False where it was cut at `max_new_tokens`


class EvaluationModel:
    """Completes rows of the prompt stage.

    What a checkpoint's `generation_config.json` says of sampling is left out, so that two models are asked alike; the
    tokens that it names as ends of a turn do end a completion.

    Args:
        name: What tables call it.
        model: The policy, adapters unmerged.
        processor: Its processor, with the chat template.

    Example:
        >>> model = EvaluationModel.load("runs/ppo")  # doctest: +SKIP
        >>> rows = load_rows("rows.jsonl", "prompt")  # doctest: +SKIP
        >>> [generated.text for generated in model.complete(rows, Decoding())]  # doctest: +SKIP
        ['A red square.']
    """

    def __init__(self, name: str, model: PreTrainedModel | PeftModel, processor: ProcessorMixin) -> None:
        self.name = name
        self.model = model.eval()
        self.processor = processor
        tokenizer = processor.tokenizer
        named = base_of(model).generation_config.eos_token_id
        ends = [named] if isinstance(named, int) else named or []
        self.stop_tokens = sorted({*ends, tokenizer.eos_token_id})
        self.suppressed = suppressed_tokens(model, tokenizer)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        base: str | None = None,
        dtype: str = "auto",
        load_in_4bit: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        chat_template_path: str | None = None,
    ) -> "EvaluationModel":
        """Load a model onto this process's GPU if there is one.

        Args:
            name: Hub ID (`org/name@revision` too) or folder: of a model, an adapter, a run or one of its checkpoints.
            base: The base of an adapter, if not the one that it names.
            dtype: "float32", "bfloat16", ..., or "auto" for that of the checkpoint (bfloat16 in 4 bit).
            load_in_4bit: Quantise the base's language model.
            attn_implementation: As for transformers.
            trust_remote_code: Run code that the repository brings along.
            chat_template_path: Chat template instead of the saved one.

        Returns:
            The model.

        Raises:
            OSError: If there is no such model.
            ValueError: If it is no policy, or lacks what generation needs.
        """
        path, revision = split_revision("--model", name)
        check_has_model(path)
        check_answers(path, revision)
        trained_on = adapter_base(path, revision)
        whole, at = (path, revision) if trained_on is None else _base_of_adapter(path, revision, base or trained_on)
        arguments = model_config(
            dtype,
            load_in_4bit=load_in_4bit,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            model_name_or_path=whole,
            model_revision=at or "main",
        )
        model = load_policy(arguments)
        if trained_on is not None:
            model = load_adapter(model, path, is_trainable=False, revision=revision)
        if not load_in_4bit:  # a quantised one is placed on loading
            model = model.to(PartialState().device)
        if find_file(path, "processor_config.json", revision) is not None:
            whole, at = path, revision
        processor = load_processor(
            whole,
            revision=at,
            trust_remote_code=trust_remote_code,
            chat_template_path=chat_template_path,
            field="--model",
        )
        return cls(name, model, processor)

    def complete(self, rows: Iterable[Row], decoding: Decoding) -> Iterator[Generated]:
        """Complete rows in their order, a batch at a time.

        Args:
            rows: Rows with `row_name`, `images` and `prompt`, as `load_rows(..., "prompt")` gives them.
            decoding: How.

        Yields:
            One completion for each row.
        """
        remaining, first = iter(rows), 0
        while batch := list(islice(remaining, decoding.batch_size)):
            yield from self._batch(batch, first, decoding)
            first += len(batch)

    def stream(self, row: Row, decoding: Decoding, streamer: BaseStreamer, turn: int = 0) -> Generated:
        """Complete one row, its tokens handed to `streamer` as they come; `turn` chooses the draw."""
        return self._batch([row], turn, decoding, streamer)[0]

    @torch.inference_mode()
    def _batch(
        self, rows: Sequence[Row], first: int, decoding: Decoding, streamer: BaseStreamer | None = None
    ) -> list[Generated]:
        """Complete the rows from number `first` on."""
        device, tokenizer = self.model.device, self.processor.tokenizer
        inputs = ModelInputs.from_batch(PromptCollator(self.processor, columns=())(rows), device)
        kwargs = {
            key: value.to(self.model.dtype) if value.is_floating_point() else value
            for key, value in inputs.prompt_kwargs().items()
        }
        processors = LogitsProcessorList()
        if decoding.temperature > 0:
            keys = row_keys(decoding.seed, 0, torch.arange(first, first + len(rows), device=device))
            processors.append(RowNoise(keys, inputs.query_length, decoding.temperature))
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,  # `RowNoise` makes the argmax a draw
            eos_token_id=self.stop_tokens,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=self.suppressed or None,
        )
        with neutral_generation_config(self.model):
            output = self.model.generate(
                **kwargs,
                generation_config=config,
                logits_processor=processors,
                streamer=streamer,
            )
        return [self._generated(ids) for ids in output[:, inputs.query_length :].tolist()]

    def _generated(self, ids: list[int]) -> Generated:
        end = next((place for place, token in enumerate(ids) if token in self.stop_tokens), None)
        kept = ids if end is None else ids[: end + 1]
        text = self.processor.tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Generated(text, len(kept), end is not None)


def _base_of_adapter(adapter: str, revision: str | None, base: str) -> tuple[str, str | None]:
    """The base to put an adapter on, with its revision: the one that the adapter names, unless `base` has its own."""
    if not base:
        raise InputError(f"the adapter {adapter} does not name its base model: name it with --base")
    base, at = split_revision("--base", base)
    check_there(f"the base of {adapter} (--base gives another)", base, at)
    return base, at or PeftConfig.from_pretrained(adapter, revision=revision).revision


def check_has_model(name: str, field: str = "--model") -> None:
    """Refuse a folder that holds no finished model, and name the newest checkpoint in it if there is one."""
    folder = Path(name)
    if not folder.is_dir() or any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        return
    newest = checkpoints(folder)[-1:]
    hint = f"its newest checkpoint is {newest[0]}" if newest else "is it the folder of a run that has ended?"
    raise InputError(f"{field}: {name} holds no model (no adapter_config.json and no config.json); {hint}")


def check_answers(name: str, revision: str | None) -> None:
    """Refuse a reward model, which has a head for scores and none for words."""
    if find_file(name, SETTINGS_FILE, revision) is not None:
        raise InputError(
            f"--model: {name} is a reward model (it has {SETTINGS_FILE}): it scores completions and writes none. "
            "Name a policy, or use `trl-llava score`"
        )
