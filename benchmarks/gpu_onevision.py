"""LLaVA-OneVision-0.5B's real shape with random weights, and its recipes as they are but for rows and steps."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from benchmarks.gate import Gate, gated
from benchmarks.ppo_sides import gated_ppo
from benchmarks.rows import command_line, make_rows
from benchmarks.workload import Size, make_reward, make_tokenizer
from trl_llava import train_ppo, train_reward, train_sft

RECIPES = Path(__file__).parents[1] / "recipes" / "llava-onevision-0.5b"
PIXELS = 640
ACCUMULATION = 4
"""Passes of a step, where the recipes have 128: a step is as many of them."""
SIZE = Size(vocabulary=151_936, hidden=896, layers=24, heads=14, tower_hidden=1152, tower_layers=26, rank=64)
"""What the rows and the adapters are made for; the processor tiles a picture of 640 x 640 to ten times its tokens."""
ENTRIES: dict[str, Any] = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo}


def prepare(folder: Path, size: Size = SIZE, device: str = "cuda", side: int = 384) -> None:
    """Write base and reward model; `side` are the pixels of a tile."""
    if (folder / "reward").exists():
        return
    tokenizer = make_tokenizer(size.vocabulary)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", None
    grid = [[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, image_grid_pinpoints=grid),
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": side, "width": side}),
        num_image_tokens=(side // 14) ** 2,
        vision_feature_select_strategy="full",
        chat_template=(RECIPES / "chat_template.jinja").read_text(),
    )
    tower = SiglipVisionConfig(
        image_size=side,
        patch_size=14,
        vision_use_head=False,
        hidden_size=size.tower_hidden,
        intermediate_size=round(size.tower_hidden * 4304 / 1152),
        num_hidden_layers=size.tower_layers,
        num_attention_heads=16,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=round(size.hidden * 4864 / 896),
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaOnevisionConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    make_reward(folder / "base", size, folder / "reward", dtype=torch.bfloat16, device=device)


def words_of(stage: str, folder: Path, output: Path | str, steps: int, batch: int, **fields: Any) -> list[str]:
    """The command line of a stage: its recipe, with rows of ours and `ACCUMULATION` passes a step."""
    values: dict[str, Any] = {
        "dataset_name": folder / "rows" / "rows.jsonl",
        "image_folder": folder / "rows",
        "model_name_or_path": folder / "base",
        "gradient_accumulation_steps": ACCUMULATION,
        "dataloader_num_workers": 0,
        "output_dir": output,
        "captions_file": None,
        "test_split_size": None,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if stage == "ppo":
        values |= {"sft_model_path": None, "use_peft": True, "lora_r": 64, "reward_model_path": folder / "reward"}
        values |= {"total_episodes": batch * ACCUMULATION * steps, "num_sample_generations": 0}
    else:
        values |= {"max_steps": steps}
    return ["--config", str(RECIPES / f"{stage}.yaml"), *command_line({**values, **fields})]


def side(gate: Gate, stage: str, steps: int, folder: Path, **fields: Any) -> None:
    """Run a stage's recipe, with a gate between its steps."""
    batch = 4 if stage == "ppo" else 1
    columns = {"sft": ["completion"], "reward": ["chosen", "rejected"], "ppo": []}[stage]
    size = Size(vocabulary=300, image_tokens=(PIXELS // 14) ** 2)
    make_rows(size, folder / "rows", batch * ACCUMULATION * steps, dict.fromkeys(columns, (32, 96)))
    if stage == "ppo":
        train_ppo.LlavaPPOTrainer = gated_ppo(gate, [256] * batch * ACCUMULATION)
    else:
        name = {"sft": "LlavaSFTTrainer", "reward": "LlavaRewardTrainer"}[stage]
        setattr(ENTRIES[stage], name, gated(getattr(ENTRIES[stage], name), gate))
    with tempfile.TemporaryDirectory(dir=folder) as output:
        ENTRIES[stage].main(words_of(stage, folder, output, steps, batch, **fields))
