"""The worst moments of a step of SFT and of the reward model: their trainers' own step, on a model without weights."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin, Trainer

from trl_llava.data.collators import IGNORED
from trl_llava.data.contract import COMPLETIONS, Stage, stage_features
from trl_llava.data.preference_collators import PreferenceCollator
from trl_llava.errors import InputError
from trl_llava.models.shared_prefix import pack_pairs
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.sft_trainer import LlavaSFTTrainer
from trl_llava.tools.plan.dry_models import add_adapter, build_classifier, build_policy, shaped
from trl_llava.tools.plan.dry_run import dry_run
from trl_llava.tools.plan.formulas import (
    cast_as_deepspeed,
    gradients_at_the_step,
    gradients_between_steps,
    optimizer_states,
    step_buffers,
    trained,
    weights,
)
from trl_llava.tools.plan.inputs import image_inputs, text_inputs, token_kinds
from trl_llava.tools.plan.job import Job, Moment, Need, Settings
from trl_llava.tools.plan.no_memory import NoMemory
from trl_llava.tools.plan.starts import base_config, find_start


def supervised_need(job: Job, settings: Settings) -> Need:
    """What a step of SFT or of the reward model needs: the passes, and the optimizer's step."""
    start = base_config(job.model_args, job.sources)
    job = replace(job, processes=job.processes.for_width(start.config.get_text_config().hidden_size))
    model, notes = _trainee(job, settings, start.config)
    cast_as_deepspeed([model], job.processes, job.bf16)
    without_memory = NoMemory()
    without_memory.take(model)
    with _trainer_of(job, settings, model) as trainer:
        held = weights(model, job.processes) + between_steps(parameters := trained([model]), job)
        batch = _batch(job, settings, start.config, trainer, without_memory)
        # Under autocast from now on, where the recipe trains in bf16.
        prepared = trainer.accelerator.prepare_model(trainer.model, device_placement=False)
        if settings.checkpointing:  # as training begins with
            kwargs = dict(job.args.gradient_checkpointing_kwargs or {})
            every = kwargs.pop("every_n_layers", 1)
            model.activation_checkpointing_enable(kwargs or None, every_n_layers=every)
        trainer.current_gradient_accumulation_steps = settings.accumulation
        _, labels = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        run = partial(trainer.training_step, prepared, batch, labels)
        more = settings.accumulation > 1
        peak = dry_run([model], run, without_memory, job.processes, accumulated=more, batch=batch)
    passes = Moment("forward and backward", held + peak)
    return Need([passes, optimizer_step(held, parameters, job)], notes=[*start.notes, *notes])


def between_steps(parameters: list[nn.Parameter], job: Job) -> Counter[str]:
    """What is there all the time besides weights, by part."""
    states = optimizer_states(parameters, job.args.optim, job.processes)
    return Counter(optimizer=states, gradients=gradients_between_steps(parameters, job.processes))


def optimizer_step(held: Counter[str], parameters: list[nn.Parameter], job: Job) -> Moment:
    """The optimizer's step: all gradients are there besides what is `held` all the time, but no activations."""
    here = Counter(gradients=gradients_at_the_step(parameters, job.processes))
    here["optimizer"] = step_buffers(parameters, job.args.optim, job.processes)
    return Moment("optimizer step", held + here)


def _trainee(job: Job, settings: Settings, config: PreTrainedConfig) -> tuple[nn.Module, list[str]]:
    """The model of a stage with its adapter, on the meta device, and where the adapter's shape is from."""
    args, adapter, notes = job.with_bits(settings), None, []
    if args.adapter_name_or_path is not None:
        name, revision = args.adapter_name_or_path, args.adapter_revision
        start = find_start("adapter_name_or_path", name, revision, job.sources, args, args.model_name_or_path)
        args, adapter, notes = shaped(args, start.shape), start.adapter, [*start.notes]
    classifier = job.stage == "reward"
    model = build_classifier(config, args) if classifier else build_policy(config, args)
    return add_adapter(model, args, task="SEQ_CLS" if classifier else "CAUSAL_LM", trained=adapter), notes


@contextmanager
def _trainer_of(job: Job, settings: Settings, model: nn.Module) -> Iterator[Trainer]:
    """The stage's own trainer of a model without memory, on the CPU, with one row that nobody reads."""
    if job.args.use_liger_kernel:
        raise InputError("use_liger_kernel: the memory of liger's kernels is not known here; plan without it")
    stage: Stage = "preference" if job.stage == "reward" else "sft"
    message = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
    row = dict.fromkeys(("prompt", *COMPLETIONS[stage]), message) | {"row_name": "", "images": [], "captions": [""]}
    features = stage_features(stage)
    rows = Dataset.from_list([{name: row[name] for name in features}], features=features)
    trainer_class = LlavaRewardTrainer if job.stage == "reward" else LlavaSFTTrainer
    processor = _Processor()
    with tempfile.TemporaryDirectory() as folder, patch.object(Trainer, "_move_model_to_device"):
        args = replace(
            job.args,
            output_dir=folder,
            per_device_train_batch_size=settings.rows,
            gradient_accumulation_steps=settings.accumulation,
            activation_checkpointing=settings.checkpointing,
            gradient_checkpointing=settings.checkpointing,
            bf16=job.autocast,
            fp16=False,
            use_cpu=True,
            report_to=[],
            push_to_hub=False,
            eval_strategy="no",
            load_best_model_at_end=False,
            chat_template_path=None,
            eos_token=None,
        )
        yield trainer_class(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=processor,
            data_collator=_NoBatches(processor),
        )


class _NoBatches(PreferenceCollator):
    """A collator that makes no batch and has no limit to hold a row against; the trainer sets its `share_prefix`."""

    limit: ClassVar[str] = ""


class _Processor(ProcessorMixin):
    """A processor that knows one word: a plan loads none, and makes its batch itself."""

    def __init__(self) -> None:
        words = Tokenizer(WordLevel({"": 0}, unk_token=""))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="", eos_token="", unk_token="")


def _batch(
    job: Job, settings: Settings, config: PreTrainedConfig, trainer: Trainer, without_memory: NoMemory
) -> dict[str, Any]:
    """B rows of the longest length with all tokens labelled, or B pairs, as the stage's collator makes them."""
    rows, length = settings.rows, job.length
    images = image_inputs(config, rows * job.images, without_memory.fake, length // max(1, job.images))
    if job.stage == "sft":
        text = text_inputs(rows, length)
        images |= token_kinds(config, rows, length)
        return {**text, "labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, IGNORED), **images}
    if not trainer.data_collator.share_prefix:
        copies = {"image_copies": 2} if images else {}
        return {**text_inputs(2 * rows, length), **images, **token_kinds(config, 2 * rows, length), **copies}
    image_tokens = job.images * (getattr(config, "image_seq_length", None) or 0)
    shared = max(1, min(image_tokens if job.shared_length is None else job.shared_length, length - 1))
    chosen, rejected = ([[1] * shared + [token] * (length - shared)] * rows for token in (2, 3))
    return {**pack_pairs(chosen, rejected)._asdict(), **images}
