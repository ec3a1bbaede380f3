"""A small LLaVA that has learned easy-VQA's pictures and questions, made as the demo's base is."""

import random
import re
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionModel

from benchmarks.easy_vqa_data import COLOURS, SHAPES, Part, Question
from trl_llava.demo.base_tower import make_tower, train
from trl_llava.demo.make_base import Lessons, bullets, join, make_image_processor
from trl_llava.demo.tokenizer import make_tokenizer

SIZE, PATCH = 64, 16
IMAGE_TOKENS = (SIZE // PATCH) ** 2
STEPS = (1800, 500, 300, 250, 600)
"""Of the tower and of the four lessons."""
WHAT = "what is in the image?"  # easy-VQA never asks it; the projector learns by it
JUDGING = ("Is", "it", "true", "True", "ASSISTANT:")  # words of the reward recipes' judging turn, and of the template


class EasyLessons(Lessons):
    """Questions about images of easy-VQA that have a caption, as often about what is there as about what is not."""

    def __init__(self, train_part: Part, seed: int) -> None:
        texts = [WHAT, *(f"{q.text} {q.answer}" for q in train_part.questions)]
        words = sorted({word for text in texts for word in re.findall(r"\w+", text)})
        tokenizer = make_tokenizer([*words, *JUDGING], phrase="[a-z]+")
        super().__init__(tokenizer, list(train_part.captions.items()), seed, IMAGE_TOKENS)
        self.questions: dict[tuple[str, str], list[Question]] = {}
        for q in train_part.known:
            kind = {"yes_no": f"yes_no {q.present}"}.get(q.kind, "choice")
            self.questions.setdefault((q.image, kind), []).append(q)

    def ask(self, scene: tuple[str, str], kind: str, from_image: bool) -> tuple[str, str, str]:
        """What stands before a question, a question of a kind, and its true answer; `scene` is image and caption."""
        image, caption = scene
        wanted = f"yes_no {self.rng.random() < 0.5}" if kind == "yes_no" else kind
        found = self.questions.get((image, wanted))  # not every image has questions of every kind
        question = self.rng.choice(found) if found else Question(WHAT, caption, image)
        return self.image if from_image else bullets([caption]), question.text, question.answer


def train_tower(captions: list[str], pixels: torch.Tensor, steps: int, seed: int) -> CLIPVisionModel:
    """Teach a CLIP tower which shape in which colour `pixels` (I, 3, SIZE, SIZE) show; its head is thrown away."""
    tower, head = make_tower(SIZE, PATCH), nn.Linear(64, len(COLOURS) + len(SHAPES))
    words = [caption.split() for caption in captions]
    colours = torch.tensor([COLOURS.index(colour) for _, colour, _ in words])
    shapes = torch.tensor([SHAPES.index(shape) for *_, shape in words])
    rng = random.Random(seed)

    def loss_of() -> torch.Tensor:
        rows = torch.tensor([rng.randrange(len(pixels)) for _ in range(64)])
        # A few pixels to the side: 4,000 images are few to learn shapes from.
        seen = pixels[rows].roll((rng.randint(-3, 3), rng.randint(-3, 3)), dims=(2, 3))
        features = tower(seen, output_hidden_states=True).hidden_states[-1][:, 1:]
        logits = head(features).mean(dim=1)
        said = cross_entropy(logits[:, : len(COLOURS)], colours[rows])
        return said + cross_entropy(logits[:, len(COLOURS) :], shapes[rows])

    train([*tower.parameters(), *head.parameters()], loss_of, steps=steps, lr=2e-3, name="tower")
    return tower.eval()


def make_base(output_dir: Path, train_part: Part, seed: int, scale: float = 1.0) -> None:
    """Make the base from the training part in an empty folder; `scale` is a factor on the number of updates."""
    tower_steps, *steps = [max(1, round(scale * count)) for count in STEPS]
    image_processor = make_image_processor(SIZE)
    images = [Image.open(train_part.folder / name).convert("RGB") for name in train_part.captions]
    pixels = torch.cat(
        [
            image_processor(images[start : start + 500], return_tensors="pt")["pixel_values"]
            for start in range(0, len(images), 500)
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws initial weights from the global generator
        tower = train_tower(list(train_part.captions.values()), pixels, tower_steps, seed)
        join(output_dir, tower, image_processor, EasyLessons(train_part, seed), images[:200], pixels, steps, seed)
