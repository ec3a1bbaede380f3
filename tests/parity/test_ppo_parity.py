"""On text-only rows with our extra terms at neutral settings, our PPO gives TRL's numbers, step after step.

Neutral also means that every response has full length: TRL puts the score behind the last real token, and the value
loss on the token after it, where ours ends. So nothing may stop a response, and the pad and image ids lie outside of
the language model's vocabulary, so that neither can be sampled. TRL's ratio statistics are left out: they are wrong
whenever gradients are accumulated (an index is advanced in the wrong loop).

"The same seed" means the same draws: TRL's trainer gets our batches and our sampling noise here, since it takes both
from torch's global generator and ours do not.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    DataCollatorWithPadding,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.data.collators import PromptCollator
from trl_llava.data.load import rows_from
from trl_llava.models.sequence_classification import LlavaForSequenceClassification
from trl_llava.ppo.randomness import RolloutBatches, RowNoise, row_keys
from trl_llava.ppo_trainer import LlavaPPOTrainer

ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL has no PPO since 1.13: `make test-oldest` runs these")
PPOConfig, PPOTrainer = ppo.PPOConfig, ppo.PPOTrainer

QUESTIONS = [
    f"{question} {object_}?"
    for question in ("Is there a", "Describe the", "What is near the", "The correct option is the")
    for object_ in ("red square", "blue circle", "green triangle", "image", "picture", "user")
]
COMPARED = (
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "lr",
    "episode",
)


class History(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.steps.append(dict(logs))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_models.tiny_tokenizer(600)
    tokenizer.add_special_tokens({"pad_token": "<outside>"})
    return tokenizer


def models(tokenizer: PreTrainedTokenizerFast) -> tuple[LlavaForConditionalGeneration, ...]:
    """Policy, value and reward model with weights of their own; the vocabulary ends before the pad token."""
    text = LlamaConfig(**tiny_models.text_config(tokenizer.pad_token_id) | {"pad_token_id": None})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny_models.vision_config()),
        text_config=text,
        image_token_index=tokenizer.pad_token_id + 1,
        num_labels=1,
    )
    built = []
    for seed, architecture in enumerate(
        (LlavaForConditionalGeneration, LlavaForSequenceClassification, LlavaForSequenceClassification)
    ):
        torch.manual_seed(seed)
        built.append(architecture(config).eval())
    torch.nn.init.normal_(built[1].score.weight)
    torch.nn.init.normal_(built[2].score.weight)
    return tuple(built)


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings both trainers take; the learning rate is high so that steps differ."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "total_episodes": 16,
        "num_ppo_epochs": 2,
        "local_rollout_forward_batch_size": 2,
        "response_length": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 7,
        **changes,
    }


def upstream(
    tokenizer: PreTrainedTokenizerFast, rows: Dataset, folder: Path, **changes: Any
) -> list[dict[str, float]]:
    policy, value, reward = models(tokenizer)
    ids = [PromptCollator(tokenizer)([row])["input_ids"][0].tolist() for row in rows]
    history = History()
    trainer = PPOTrainer(
        args=PPOConfig(**arguments(folder, **changes)),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[history],
    )
    batches = RolloutBatches(len(rows), 4, (0, 1), seed=7, steps=range(4))
    trainer.dataloader = DataLoader(trainer.train_dataset, batch_sampler=batches, collate_fn=trainer.data_collator)
    np.random.seed(7)  # TRL draws its mini-batches from the global generator
    trainer.train()
    return history.steps


class GenerateWithRowNoise:
    """TRL's `generate`, called for two rows at a time and two times a step, with the noise ours would use."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, lm_backbone: Any, queries: torch.Tensor, pad_token_id: int, generation_config: GenerationConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step, half = divmod(self.calls, 2)
        self.calls += 1
        keys = row_keys(7, step + 1, torch.arange(2) + 2 * half)
        temperature = generation_config.temperature
        greedy = GenerationConfig(
            max_new_tokens=generation_config.max_new_tokens, output_logits=True, return_dict_in_generate=True
        )
        mask = queries != pad_token_id
        output = lm_backbone.generate(
            input_ids=queries.masked_fill(~mask, 0),
            attention_mask=mask,
            generation_config=greedy,
            logits_processor=LogitsProcessorList([RowNoise(keys, queries.shape[1], temperature)]),
        )
        logits = torch.stack(output.logits, 1) / temperature
        return torch.cat((queries, output.sequences[:, queries.shape[1] :]), 1), logits


def ours(tokenizer: PreTrainedTokenizerFast, rows: Dataset, folder: Path, **changes: Any) -> list[dict[str, float]]:
    policy, value, reward = models(tokenizer)
    collator = PromptCollator(tokenizer)

    def trl_reward_model(prompts: list, completion_ids: list[list[int]], row_name: list[str], **_: Any) -> list[float]:
        """The reward model on prompt and response, without the judging turn, as TRL runs it."""
        by_name = {row["row_name"]: row for row in rows}
        scores = []
        for name, completion in zip(row_name, completion_ids, strict=True):
            prompt = collator([by_name[name]])["input_ids"]
            ids = torch.cat((prompt, torch.tensor([completion])), 1)
            with torch.no_grad():
                scores.append(reward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
        return scores

    history = History()
    settings = arguments(folder, max_grad_norm=0.0, **changes)  # TRL's PPO never clips
    trainer = LlavaPPOTrainer(
        args=LlavaPPOConfig(**settings),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_funcs=trl_reward_model,
        value_model=value,
        train_dataset=rows,
        callbacks=[history],
    )
    trainer.train()
    return history.steps


@pytest.mark.parametrize(
    "changes",
    [{}, {"kl_estimator": "k3", "gamma": 0.9, "lam": 0.8, "temperature": 1.0, "kl_coef": 0.2, "vf_coef": 0.5}],
    ids=["defaults", "k3_discounted"],
)
def test_our_numbers_are_trls(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.experimental.ppo.ppo_trainer.generate", GenerateWithRowNoise())
    questions = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    rows = rows_from(Dataset.from_list(questions), "prompt", name="questions")
    theirs = upstream(tokenizer, rows, tmp_path / "trl", **changes)
    mine = ours(tokenizer, rows, tmp_path / "ours", **changes)
    assert len(theirs) == len(mine) == 4
    for step, (expected, actual) in enumerate(zip(theirs, mine, strict=True)):
        for name in COMPARED:
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-5), f"{name} at step {step}"
    # The comparison means something only if the policy moved, and the numbers with it.
    assert theirs[-1]["objective/kl"] > 1e-3
    assert abs(theirs[-1]["loss/value_avg"] - theirs[0]["loss/value_avg"]) > 1e-3
