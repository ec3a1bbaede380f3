"""Trainers on the tiny models, for unit tests and for the processes that launched tests start."""

from pathlib import Path
from typing import Any

import tiny_models
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.models.adapters import load_adapter
from trl_llava.ppo_trainer import LlavaPPOTrainer

TARGETS = r".*language_model\..*\.(q_proj|v_proj|down_proj)"


def even_tokens(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The share of even token ids: a reward that a policy can learn, and that needs no model."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def prompt_rows(count: int = 8) -> Dataset:
    """Questions, every third without an image."""
    table = {
        "prompt": [[{"role": "user", "content": f"What is in picture {i}?"}] for i in range(count)],
        "images": [[] if i % 3 == 2 else [tiny_models.image(("red", "blue")[i % 2])] for i in range(count)],
        "answer_type": [("general", "yes", "no", "A")[i % 4] for i in range(count)],
        "captions": [[f"caption {i}"] for i in range(count)],
    }
    return Dataset.from_dict(table).cast_column("images", List(Image()))


def make_adapter(base: Path, folder: Path, trained_whole: list[str] | None = None) -> Path:
    """A LoRA adapter whose B matrices are not zero, as after SFT; modules `trained_whole` differ from the base's."""
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, modules_to_save=trained_whole)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    return folder


def make_policy(base: Path, adapter: Path) -> PeftModel:
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = load_adapter(model, str(adapter), is_trainable=True)
    return load_adapter(model, str(adapter), adapter_name="reference", is_trainable=False)


def make_value(base: Path, folder: Path | None = None) -> PeftModel:
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(folder or base, num_labels=1, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["score"]))


def ppo_trainer(base: Path, adapter: Path, folder: Path, **changes: Any) -> LlavaPPOTrainer:
    own = (
        "model",
        "value_model",
        "reward_funcs",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "value_processing_class",
        "callbacks",
        "captions_column",
    )
    given = {name: changes.pop(name) for name in own if name in changes}
    parts = {
        "model": lambda: make_policy(base, adapter),
        "value_model": lambda: make_value(base),
        "reward_funcs": lambda: even_tokens,
        "train_dataset": prompt_rows,
        "processing_class": lambda: AutoProcessor.from_pretrained(base),
    }
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "total_episodes": 8,
        "num_ppo_epochs": 1,
        "response_length": 8,
        "stop_token": "eos",
        "learning_rate": 1e-2,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "ref_adapter_name": "reference",
        **changes,
    }
    return LlavaPPOTrainer(
        args=LlavaPPOConfig(**settings),
        ref_model=None,
        **{name: build() for name, build in parts.items() if name not in given},
        **given,
    )


def favour_the_stop_token(policy: PeftModel) -> None:
    """Make responses of mixed length likely."""
    policy.get_base_model().lm_head.weight.data[policy.config.get_text_config().eos_token_id] *= 8


def weights(trainer: LlavaPPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
