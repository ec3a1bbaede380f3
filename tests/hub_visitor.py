"""Loads what a run has pushed as somebody else would, and prints what it computes.

python tests/hub_visitor.py FOLDER    # with red.png and card.md
"""

import json
import re
import sys
from pathlib import Path

import torch
from PIL import Image

QUESTION = [{"role": "user", "content": "what is it?"}]


def logits(card: str, pictures: Path) -> list[float]:
    """What a policy thinks of a question, loaded by the lines of its card."""
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.S)[0], names)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = names["processor"].apply_chat_template(asked, add_generation_prompt=True)
    batch = names["processor"](text=text, images=[Image.open(pictures / "red.png")], return_tensors="pt")
    with torch.no_grad():
        return names["model"].eval()(**batch).logits[0, -1].tolist()


def scores(name: str, pictures: Path) -> list[float]:
    """What a reward model gives two answers."""
    from trl_llava.rewards.factual_reward import FactualReward

    answers = [[{"role": "assistant", "content": text}] for text in ("a square", "a dog")]
    images, captions = [[str(pictures / "red.png")]] * 2, [["a red square"]] * 2
    return FactualReward.from_pretrained(name)([QUESTION] * 2, answers, images=images, captions=captions)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    told = {"logits": logits((folder / "card.md").read_text(), folder), "scores": scores("tester/tiny-reward", folder)}
    print(json.dumps(told))
