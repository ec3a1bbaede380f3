"""A few completions of a finished model, or scores of a reward model, with their images, for the model card."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from trl_llava.data.collators import PromptCollator
from trl_llava.data.images import load_image
from trl_llava.data.thumbnails import made_small
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.prompts import message_text
from trl_llava.publish.shareable import SAMPLES
from trl_llava.rewards.factual_reward import FactualReward

logger = logging.getLogger(__name__)

LONGEST_COMPLETION = 64


def write_samples(trainer: Any, count: int) -> None:
    """Write `count` samples of the held-out rows (else the training rows) with an image: greedy, or pairs scored."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        logger.info("No samples for the model card: the weights are spread over the processes.")
        return
    dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    with_image = ({"row_name": f"row {index}", **row} for index, row in enumerate(dataset) if row.get("images"))
    rows = [row for _, row in zip(range(count), with_image, strict=False)]
    if not rows:
        return
    samples = _score(trainer, rows) if hasattr(trainer, "judging_prompt") else _complete(trainer, rows)
    folder = Path(trainer.args.output_dir) / SAMPLES
    folder.mkdir(exist_ok=True)
    for number, (row, sample) in enumerate(zip(rows, samples, strict=True), start=1):
        made_small(load_image(row["images"][0], row["row_name"])).save(folder / f"{number}.jpg", quality=85)
        user_turns = [message for message in row["prompt"] if message["role"] == "user"]
        sample |= {"image": f"{SAMPLES}/{number}.jpg", "prompt": message_text(user_turns[-1])}
    (folder / "samples.json").write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _complete(trainer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "policy", model)
    processor, was_training = trainer.processing_class, model.training
    collator, samples = PromptCollator(processor), []
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        for row in rows:  # each on its own: no padding, which some models read differently
            inputs = ModelInputs.from_batch(collator([row]), model.device)
            ids = model.generate(
                **inputs.prompt_kwargs(),
                max_new_tokens=LONGEST_COMPLETION,
                do_sample=False,
                suppress_tokens=[processor.image_token_id],  # it would have no image
            )
            text = processor.tokenizer.decode(ids[0, inputs.query_length :], skip_special_tokens=True)
            samples.append({"completion": text.strip()})
    model.train(was_training)
    return samples


def _score(trainer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    reward = FactualReward(model, trainer.processing_class, trainer.judging_prompt, batch_size=len(rows))
    prompts = [row["prompt"] for row in rows]
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in ("images", "captions")}
    samples: list[dict[str, Any]] = [{"captions": row.get("captions") or []} for row in rows]
    for side in ("chosen", "rejected"):
        completions = [row[side] for row in rows]
        with trainer.accelerator.autocast():
            scores = reward(prompts, completions, **columns)
        for sample, completion, score in zip(samples, completions, scores, strict=True):
            sample[side] = {"completion": message_text(completion[-1]), "score": score}
    return samples
