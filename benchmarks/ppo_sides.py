"""The sides of `ppo_step`: a PPO step of our trainer, of variants of it, and of TRL's trainer on text."""

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)

from benchmarks.gate import Gate
from benchmarks.rows import NOTHING_ELSE, make_rows, run_stage
from benchmarks.workload import (
    FULL,
    SPECIAL,
    STOP,
    Size,
    lora,
    make_base,
    make_reward,
    make_text_model,
)
from trl_llava import train_ppo
from trl_llava.data.collators import PromptCollator
from trl_llava.data.contract import normalise_messages, place_images
from trl_llava.models.load import load_processor
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo.decoding import DecodingState, StaticDecoder
from trl_llava.ppo.roles import Policy
from trl_llava.ppo_trainer import LlavaPPOTrainer


@dataclass(frozen=True)
class Step:
    """What one step does, the same on all sides.

    Attributes:
        size: The models and prompts.
        lengths: Tokens of each answer of the batch, the stop token included.
        response_length: The limit.
        micro_batch: Rows of a micro-batch of the update.
        epochs: Passes of the update over the answers; the paper's recipe has 2.
        steps: How many steps are run.
        processes: How many processes run such a step together.
        low_memory: Whether to run as where memory is short: passes are run again in the backward pass instead of
            being kept, the phases before the update, generation included, take micro-batches too instead of all rows
            at once, and our trainer's head runs at 64 tokens at once.
    """

    size: Size = FULL
    lengths: tuple[int, ...] = (12, 20, 28, 36, 48, 64, 96, 128)
    response_length: int = 128
    micro_batch: int = 2
    epochs: int = 2
    steps: int = 1
    processes: int = 1
    low_memory: bool = False

    def values(self) -> dict[str, Any]:
        """Config fields that TRL's and our trainer have in common."""
        return {
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": len(self.lengths) // self.micro_batch,
            "local_rollout_forward_batch_size": self.micro_batch if self.low_memory else len(self.lengths),
            "response_length": self.response_length,
            "total_episodes": len(self.lengths) * self.steps * self.processes,
            "num_ppo_epochs": self.epochs,
            "num_mini_batches": 1,
            "stop_token": "eos",
            "temperature": 1.0,
            "num_sample_generations": 0,
            "gradient_checkpointing": self.low_memory,
            **NOTHING_ELSE,
        }


class StopSchedule(LogitsProcessor):
    """Gives each answer of a batch the length that it shall have."""

    def __init__(self, lengths: Sequence[int], prompt_length: int, stop_token: int) -> None:
        """Keep the lengths.

        Args:
            lengths: Tokens of each of the B answers, the stop token included.
            prompt_length: Columns before the first generated token.
            stop_token: Its id.
        """
        self.lengths = torch.tensor(lengths)
        self.prompt_length = prompt_length
        self.stop_token = stop_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Ban the stop token, or all others.

        Args:
            input_ids: (B, length so far).
            scores: (B, V).

        Returns:
            (B, V).
        """
        due = self.lengths.to(scores.device) == input_ids.shape[1] - self.prompt_length + 1
        stop, others = scores[:, self.stop_token].clone(), scores.masked_fill(due.unsqueeze(1), -torch.inf)
        others[:, self.stop_token] = torch.where(due, stop.clamp(min=0.0), -torch.inf)
        return others


class ForcedLengths(StaticDecoder):
    """Our decoder, with completions of given lengths, one batch after the other."""

    def __init__(self, decoder: StaticDecoder, lengths: Sequence[int]) -> None:
        self.__dict__.update(vars(decoder))
        self.lengths = list(lengths)
        self.begun = 0

    def decode(self, policy: Any, inputs: ModelInputs, keys: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As the decoder does; each call goes on with the next lengths."""
        self.own = torch.tensor(self.lengths[self.begun : self.begun + len(inputs)], device=inputs.input_ids.device)
        self.begun = (self.begun + len(inputs)) % len(self.lengths)
        return super().decode(policy, inputs, keys)

    def _choose(self, scores: torch.Tensor, state: DecodingState) -> torch.Tensor:
        stop = SPECIAL.index(STOP)
        due = self.own[state.rows] == state.step + 1
        other = super()._choose(scores.index_fill(1, torch.full_like(state.step, stop), -torch.inf), state)
        return torch.where(due, stop, other)


def force_lengths(lengths: Sequence[int]) -> None:
    """Make every `generate` of this process, which is what TRL calls, give completions of these lengths.

    Args:
        lengths: Tokens of each completion of a batch, the stop token included; calls take them one after the other.
    """
    generate = GenerationMixin.generate
    begun = 0

    @functools.wraps(generate)
    def scheduled(self: Any, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        nonlocal begun
        ids = kwargs["input_ids"]
        own = list(lengths[begun : begun + len(ids)])
        begun = (begun + len(ids)) % len(lengths)
        schedule = StopSchedule(own, ids.shape[1], SPECIAL.index(STOP))
        return generate(
            self, *args, logits_processor=LogitsProcessorList([*(logits_processor or []), schedule]), **kwargs
        )

    GenerationMixin.generate = scheduled


def prepare(folder: Path, step: Step) -> None:
    """Write what all sides load.

    Args:
        folder: Where.
        step: The sizes.
    """
    base = make_base(step.size, folder / "base")
    make_text_model(step.size, folder / "text")
    make_reward(base, step.size, folder / "reward")
    make_reward(base, step.size, folder / "whole_reward", whole=True)
    # Pictures of its own for every step: none of them has been encoded before.
    make_rows(step.size, folder / "rows", len(step.lengths) * step.steps * step.processes, {})


def our_side(
    gate: Gate, folder: Path, step: Step, trainer_class: type[LlavaPPOTrainer] = LlavaPPOTrainer, **fields: Any
) -> None:
    """Run `trl-llava ppo` as a user does, with a gate between its steps.

    Args:
        gate: The gate.
        folder: What `prepare` has written.
        step: What a step does.
        trainer_class: Our trainer, or one that differs from it.
        **fields: Further keys of the recipe.
    """
    train_ppo.LlavaPPOTrainer = gated_ppo(gate, step.lengths, trainer_class)
    run_stage(train_ppo.main, folder, step.size, our_values(folder, step, **fields))


def gated_ppo(
    gate: Gate, lengths: Sequence[int], trainer_class: type[LlavaPPOTrainer] = LlavaPPOTrainer
) -> type[LlavaPPOTrainer]:
    """Our trainer, whose steps wait at a gate, and whose completions have these lengths."""

    class Gated(trainer_class):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[gate], **kwargs)
            self.generator.decoder = ForcedLengths(self.generator.decoder, lengths)
            phase = self.clock.phase

            def both(name: str) -> Any:
                return _Both(gate.phase(name), phase(name))

            self.clock.phase = both

    return Gated


def our_values(folder: Path, step: Step, **fields: Any) -> dict[str, Any]:
    """The recipe of our side, with further keys; with its fresh adapter the reference is the bare base, as TRL's."""
    low = {"logits_chunk_size": 64} if step.low_memory else {}
    return {"reward_model_path": folder / "reward", **step.values(), **low, **fields}


def copies_side(gate: Gate, folder: Path, step: Step) -> None:
    """Run our trainer with a base for each role, that of the reference included.

    Args:
        gate: The gate.
        folder: What `prepare` has written.
        step: What a step does.
    """
    load = train_ppo.load_policy_roles

    def with_a_reference_of_its_own(*args: Any) -> Policy:
        return load(*args)._replace(reference=load(*args).model.requires_grad_(False).eval())

    train_ppo.load_policy_roles = with_a_reference_of_its_own
    our_side(gate, folder, step, share_base=False)


def whole_side(gate: Gate, folder: Path, step: Step) -> None:
    """Run our trainer without adapters: four whole models, two of them trained.

    Args:
        gate: The gate.
        folder: What `prepare` has written.
        step: What a step does.
    """
    our_side(gate, folder, step, use_peft=False, reward_model_path=folder / "whole_reward")


class _Both:
    """Two context managers as one."""

    def __init__(self, *managers: Any) -> None:
        self.managers = managers

    def __enter__(self) -> None:
        for manager in self.managers:
            manager.__enter__()

    def __exit__(self, *error: Any) -> None:
        for manager in reversed(self.managers):
            manager.__exit__(*error)


def trl_side(gate: Gate, folder: Path, step: Step, dtype: str = "float32", **fields: Any) -> None:
    """Run TRL's `PPOTrainer` on text that is as long as our prompts with their image tokens.

    Args:
        gate: The gate.
        folder: What `prepare` has written.
        step: What a step does.
        dtype: Of the models' weights.
        **fields: Further fields of its config.
    """
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
        from trl.experimental.ppo import ppo_trainer as upstream
    except ImportError as error:
        raise SystemExit("TRL has no PPO since 1.13: install constraints-oldest.txt to run its side") from error
    force_lengths(step.lengths)
    upstream.batch_generation = gate.timed("generation", upstream.batch_generation)
    forward, get_reward = upstream.forward, upstream.get_reward

    def timed_forward(model: Any, *args: Any) -> Any:
        with gate.phase("update" if torch.is_grad_enabled() else "forward"):
            return forward(model, *args)

    def timed_reward(model: Any, *args: Any) -> Any:
        with gate.phase("score" if model is reward else "forward"):
            return get_reward(model, *args)

    upstream.forward, upstream.get_reward = timed_forward, timed_reward
    text, size = folder / "text", step.size
    policy = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
    value, reward = (
        get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(text, num_labels=1, dtype=dtype), lora(size, head=True)
        )
        for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(text)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=output, **{**step.values(), **fields}),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=reward.requires_grad_(False),
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": text_prompts(folder)}),
            peft_config=lora(size),
            callbacks=[gate],
        )
        trainer.accelerator.backward = gate.timed("update", trainer.accelerator.backward)
        trainer.optimizer.step = gate.timed("update", trainer.optimizer.step)
        trainer.train()


def text_prompts(folder: Path) -> list[list[int]]:
    """Our prompts for a model that cannot see: where the image tokens were, there are words.

    Args:
        folder: What `prepare` has written.

    Returns:
        The ids of each prompt.
    """
    collator = PromptCollator(load_processor(str(folder / "base")))
    rows = [json.loads(line) for line in (folder / "rows" / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        messages = normalise_messages(row["prompt"], "row")
        row["prompt"] = place_images(messages, len(row["images"]), "row")
        row["images"] = [str(folder / "rows" / name) for name in row["images"]]
        row["row_name"] = "row"
    batch = collator(rows)
    image = SPECIAL.index("<image>")
    replaced = batch["input_ids"].masked_fill(batch["input_ids"] == image, len(SPECIAL))
    return [ids[mask.bool()].tolist() for ids, mask in zip(replaced, batch["attention_mask"], strict=True)]
