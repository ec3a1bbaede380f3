"""The eyes of the demo's base model: a small CLIP tower, taught to tell what is in each cell of an image."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.nn.functional import interpolate as upsample
from transformers import CLIPVisionConfig, CLIPVisionModel

from trl_llava.demo.world import GRID, OBJECTS, SIZE, Scene

IMAGE_TOKENS = GRID * GRID
# Decides how much `make_weak_eyed` leaves: of the shapes at 12 pixels, the tower's head names 45 % right at 0, 67 % at
# 0.005, 87 % at 0.02 (colours always, and everything at 48 pixels).
BLURRED = 0.005


def train(
    parameters: Iterable[nn.Parameter], loss_of: Callable[[], torch.Tensor], *, steps: int, lr: float, name: str
) -> None:
    """AdamW with a short warm-up and a linear decay to 0; `loss_of` makes the next batch and returns its loss."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 50, (steps - i) / steps))
    start, recent = time.perf_counter(), []
    for step in range(1, steps + 1):
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 200 == 0 or step == steps:
            print(
                f"{name} {step}/{steps} loss {sum(recent) / len(recent):.4f} {time.perf_counter() - start:.0f}s",
                flush=True,
            )
            recent = []


def make_tower(image_size: int, patch_size: int) -> CLIPVisionModel:
    """A CLIP tower of two layers that sees nothing yet, its weights drawn from torch's current seed."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=64,
        )
    )


def train_tower(scenes: list[Scene], pixels: torch.Tensor, steps: int, generator: torch.Generator) -> CLIPVisionModel:
    """Teach a CLIP tower what is in each cell of `pixels` (I, 3, SIZE, SIZE); its head is thrown away."""
    tower = make_tower(SIZE, SIZE // GRID)
    head = nn.Linear(64, len(OBJECTS) + 1)
    labels = torch.full((len(scenes), IMAGE_TOKENS), len(OBJECTS))
    for row, scene in enumerate(scenes):
        for placed in scene.objects:
            labels[row, placed.cell] = OBJECTS.index(placed.name)

    def loss_of() -> torch.Tensor:
        rows = torch.randint(len(scenes), (64,), generator=generator)
        seen = pixels[rows]
        blurred = torch.rand(len(rows), generator=generator) < BLURRED
        seen[blurred] = upsample(avg_pool2d(seen[blurred], 4), scale_factor=4)
        features = tower(seen, output_hidden_states=True).hidden_states[-1][:, 1:]
        return cross_entropy(head(features).flatten(0, 1), labels[rows].flatten())

    train([*tower.parameters(), *head.parameters()], loss_of, steps=steps, lr=2e-3, name="tower")
    return tower.eval()
