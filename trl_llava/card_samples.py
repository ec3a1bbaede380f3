"""A few answers of a finished model about pictures of its data, for its model card."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trl_llava.data.collators import PromptCollator
from trl_llava.data.images import load_image
from trl_llava.ppo.report import last_question
from trl_llava.publish.shareable import SAMPLES
from trl_llava.rewards.factual_reward import FactualReward

logger = logging.getLogger(__name__)

LONGEST_SIDE = 256
LONGEST_ANSWER = 64


def write_samples(trainer: Any, count: int) -> None:
    """Answer questions of the held-out rows (else of the training rows), greedily; a reward model scores its pairs.

    Args:
        trainer: The trainer, after training; only its first process is needed.
        count: How many rows with a picture are taken; 0 writes nothing.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        logger.info("No sample answers for the model card: the weights are shared out over processes.")
        return
    rows = _rows_with_picture(trainer, count)
    if not rows:
        return
    folder = Path(trainer.args.output_dir) / SAMPLES
    folder.mkdir(exist_ok=True)
    answers = _scored(trainer, rows) if hasattr(trainer, "judging_prompt") else _answered(trainer, rows)
    for number, (row, told) in enumerate(zip(rows, answers, strict=True), start=1):
        picture = load_image(row["images"][0], row["row_name"])
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        picture.save(folder / f"{number}.jpg", quality=85)
        told |= {"picture": f"{SAMPLES}/{number}.jpg", "question": last_question(row["prompt"])}
    (folder / "samples.json").write_text(json.dumps(answers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rows_with_picture(trainer: Any, count: int) -> list[dict[str, Any]]:
    rows = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if isinstance(rows, dict):
        rows = next(iter(rows.values()))
    found: list[dict[str, Any]] = []
    for row in rows if count else ():
        if row.get("images"):
            found.append({"row_name": f"row {len(found)}", **row})
        if len(found) == count:
            break
    return found


def _answered(trainer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One answer per row, each on its own: no padding, so no model that pads differently answers differently."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "policy", model)
    processor, was_training = trainer.processing_class, model.training
    collator = PromptCollator(processor)
    told = []
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        for row in rows:
            batch = collator([row])
            batch.pop("columns")
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            ids = model.generate(
                **inputs,
                max_new_tokens=LONGEST_ANSWER,
                do_sample=False,
                suppress_tokens=[processor.image_token_id],  # it would have no picture
            )
            answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            told.append({"answer": answer.strip()})
    model.train(was_training)
    return told


def _scored(trainer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    reward = FactualReward(model, trainer.processing_class, trainer.judging_prompt, batch_size=len(rows))
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in ("prompt", "images", "captions")}
    told: list[dict[str, Any]] = [{"captions": row.get("captions") or []} for row in rows]
    for side in ("chosen", "rejected"):
        answers = [row[side] for row in rows]
        with trainer.accelerator.autocast():
            scores = reward(columns["prompt"], answers, images=columns["images"], captions=columns["captions"])
        for one, answer, score in zip(told, answers, scores, strict=True):
            one[side] = {"answer": _text(answer), "score": score}
    return told


def _text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)
