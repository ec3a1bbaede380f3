"""Files in the published shapes (arXiv 2309.14525), a hundred rows each, with pictures of their own."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

ROWS = 100


def write(folder: Path, rows: int = ROWS, pictures: int = 25, size: tuple[int, int] = (64, 48)) -> Path:
    """Write `preferences.json`, `sft.json`, `ppo.json`, `image_to_caption.json` and `coco/*.jpg`.

    Of the PPO rows, as published, the first are open questions, then come multiple-choice ones, then yes/no; only some
    have `caption_type` or `length_bonus`. Multiple-choice rows have captions of their own under `aok_` keys.
    """
    (folder / "coco").mkdir(parents=True)
    names = [f"{index:012}.jpg" for index in range(pictures)]
    for index, name in enumerate(names):
        shade = index * 37 % 256
        Image.effect_noise(size, 60).convert("RGB").point(lambda v, s=shade: (v + s) % 256).save(
            folder / "coco" / name, quality=80
        )
    image = lambda index: names[index % pictures]  # noqa: E731
    dump(folder / "preferences.json", [preference_row(image(i), i) for i in range(rows)])
    dump(folder / "sft.json", [sft_row(image(i), i) for i in range(rows)])
    dump(folder / "ppo.json", [ppo_row(image(i), i, rows) for i in range(rows)])
    captions: dict[str, list[str]] = {name: [f"Caption {k} of {name}." for k in range(5)] for name in names}
    captions |= {f"aok_{name}": [f"The answer and its rationale for {name}."] for name in names}
    dump(folder / "image_to_caption.json", captions)
    return folder


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def preference_row(image: str, index: int) -> dict[str, Any]:
    """`zhiqings/LLaVA-Human-Preference-10K`: the last turn of `conversations` is a placeholder."""
    turns = [human(f"What is in picture {index}?\n<image>"), gpt("A street."), human("How many cars?"), gpt("")]
    return {
        "id": index,
        "image": image,
        "conversations": turns if index % 2 else [turns[0], turns[3]],
        "output_1": gpt(f"There are {index} cars and a dog."),
        "output_2": gpt("There are no cars."),
        "preference": index % 2 + 1,
        "hallucination": False,
        "flip": False,
    }


def sft_row(image: str, index: int) -> dict[str, Any]:
    """`llava_reward10k-aokvqa5k.json`: conversations, and questions with an answer and its reasoning."""
    if index % 3 == 2:
        question = human(f"<image>\nWhich {index}? A. one B. two. Answer with the option's letter.")
        return {"id": f"aok{index}", "image": image, "conversations": [question, gpt("Because. So B. two.")]}
    turns = [human("<image>\nDescribe it."), gpt("A street with cars." * (index % 5 + 1)), human("Why?"), gpt("Art.")]
    return {"id": index, "image": image, "conversations": turns}


def ppo_row(image: str, index: int, rows: int) -> dict[str, Any]:
    """`llava_ppo50k-aokvqa12k-vqa10k.json`, sorted by source."""
    part = index / rows
    row: dict[str, Any] = {"id": index, "image": image}
    if part < 0.7:
        row["conversations"] = [human("Describe the picture.\n<image>"), gpt("A street.")]
    elif part < 0.86:
        row["conversations"] = [human("<image>\nWhich one? A. one B. two C. three D. four"), gpt("B")]
        row |= {"caption_type": 2 + index % 4, "length_bonus": 0.5}
    else:
        row["conversations"] = [human("<image>\nIs there a dog?"), gpt("No")]
        row |= {"caption_type": 6 + index % 2}
    return row
