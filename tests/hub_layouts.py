"""A file of two rows in the layout of each preference data set that is read as it lies on the Hub."""

import json
from pathlib import Path
from typing import Any

import tiny_models
from datasets import Dataset

QUESTION, CHOSEN, REJECTED = "What is it?", "There is a red square.", "There is a blue circle."
PAIR = {"chosen": CHOSEN, "rejected": REJECTED}


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _rated(text: str, rating: str) -> dict[str, Any]:
    names = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    return {"response": text, "model": "a", "annotations": {name: {"Rating": rating} for name in names}}


ASKED = [_said("user", f"<image>{QUESTION}"), _said("assistant", CHOSEN)]
OUTPUTS = {f"output_{i}": {"from": "llava", "value": text} for i, text in enumerate(PAIR.values(), 1)}

JSON: dict[str, dict[str, Any]] = {
    "MM-RLHF, pairs": {"image": "a.png", "prompt": QUESTION, **PAIR},
    "MM-RLHF, ranked": {
        **{"image": "a.png", "question": QUESTION, "models_output": [REJECTED, CHOSEN], "final_ranking": [2, 1]},
        **{"faithfulness": [1, 5], "helpfulness": [2, 4], "ethical": [5, 5], "answer": "A square."},
    },
    "VLFeedback": {
        **{"id": "svit-1", "prompt": QUESTION, "models": ["a", "b"], "img_path": "a.png"},
        "completions": [_rated(REJECTED, "1"), _rated(CHOSEN, "5")],
    },
    "plain texts": {"images": ["a.png", "a.png"], "prompt": "Is <image> like <image>?", **PAIR},
    "LLaMA-Factory": {
        **{"images": ["a.png"], "conversations": [{"from": "human", "value": f"<image>{QUESTION}"}]},
        **{name: {"from": "gpt", "value": text} for name, text in PAIR.items()},
    },
    "ms-swift, rejected_response": {"images": ["a.png"], "messages": ASKED, "rejected_response": REJECTED},
    "ms-swift, rejected_messages": {
        **{"images": ["a.png"], "messages": ASKED, "rejected_messages": [ASKED[0], _said("assistant", REJECTED)]},
    },
    "Multimodal RewardBench": {
        **{"ID": "1", "Image": "a.png", "Text": QUESTION, "Category": "vqa", "Better": "Output2"},
        **{"Output1": REJECTED, "Output2": CHOSEN},
    },
    "the paper": {
        **{"image": "a.png", "conversations": [{"from": "human", "value": f"{QUESTION}\n<image>"}]},
        **{**OUTPUTS, "preference": 1},
    },
}
"""Of data sets that name their images."""


def _parquet() -> dict[str, dict[str, Any]]:
    image = tiny_models.image()
    return {
        "RLAIF-V": {"ds_name": "RLAIF-V", "image": image, "question": QUESTION, **PAIR, "idx": "0"},
        "RLHF-V": {"image": image, "text": json.dumps({"question": QUESTION, **PAIR}), "idx": 0},
        "VL-RewardBench": {
            **{"id": "1", "query": QUESTION, "response": [REJECTED, CHOSEN], "image": image},
            **{"human_ranking": [1, 0], "models": ["a", "b"]},
        },
        "trl-lib/rlaif-v": {
            **{"images": [image], "prompt": [{"role": "user", "content": [{"type": "image"}, _text(QUESTION)]}]},
            **{name: [{"role": "assistant", "content": [_text(text)]}] for name, text in PAIR.items()},
        },
    }


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


NAMES = (*JSON, "RLAIF-V", "RLHF-V", "VL-RewardBench", "trl-lib/rlaif-v")


def write(name: str, folder: Path) -> Path:
    """The file of one layout: JSON lines beside their image, or parquet that holds it."""
    slug = "".join(letter if letter.isalnum() else "_" for letter in name)
    if name not in JSON:
        Dataset.from_list([_parquet()[name]] * 2).to_parquet(folder / f"{slug}.parquet")
        return folder / f"{slug}.parquet"
    tiny_models.image().save(folder / "a.png")
    (folder / f"{slug}.jsonl").write_text("\n".join([json.dumps(JSON[name])] * 2))
    return folder / f"{slug}.jsonl"
