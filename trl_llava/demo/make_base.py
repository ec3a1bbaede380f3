"""Make the demo's base model: `python -m trl_llava.demo.make_base --output_dir DIR [--seed 0]`.

What comes out: a LLaVA that sees and answers all three kinds of question truthfully, so that the demo itself shows
only the three stages. What goes in: nothing but a seed. The order matters; captions and questions learned together
from scratch never reached the questions:

1. the tower learns which object is in each cell (the head is thrown away),
2. the language model learns yes/no questions about captions in the text, then every kind,
3. `assemble_llava` joins the two, and the new projector alone learns to speak the language model's words,
4. language model and projector learn together, from images and from captions.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trl_llava.demo import language
from trl_llava.demo.base_tower import IMAGE_TOKENS, train, train_tower
from trl_llava.demo.evaluate import generate_answers
from trl_llava.demo.metrics import Answered, Truthfulness, measure
from trl_llava.demo.tokenizer import make_tokenizer
from trl_llava.demo.world import SIZE, draw, make_scene
from trl_llava.models.assemble import assemble_llava, save_with_hub_names
from trl_llava.models.vision_tower import freeze_vision

KINDS = ("describe", "yes_no", "choice")


def make_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of four layers that knows nothing yet, its weights drawn from torch's current seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            # At this width the usual 0.02 leaves the first thousand steps without a signal.
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Lessons:
    """Batches of questions with true answers, about images or about captions in the text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, scenes: Sequence[Any], seed: int, image_tokens: int = IMAGE_TOKENS
    ) -> None:
        self.tokenizer = tokenizer
        self.scenes = scenes
        self.rng = random.Random(seed)
        self.image = "<image>" * image_tokens

    def ask(self, scene: Any, kind: str, from_image: bool) -> tuple[str, str, str]:
        """What stands before a question, a question of a kind, and its true answer."""
        question = language.ask(kind, scene, self.rng)
        shown = self.image if from_image else bullets(language.captions(scene, self.rng))
        return shown, question.text, language.answer(question, scene, self.rng)

    def batch(
        self, kinds: tuple[str, ...], size: int, from_image: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Make up B = `size` rows about images, or about captions in the text.

        Returns `input_ids`, `attention_mask` and `labels`, each (B, L) and right-padded, labels -100 except on the
        completions and their ends; and the rows' indices into the scenes (B,).
        """
        indices = [self.rng.randrange(len(self.scenes)) for _ in range(size)]
        rows = [self.ask(self.scenes[index], self.rng.choice(kinds), from_image) for index in indices]
        prompts = self.tokenizer([f"USER: {shown}\n{question} ASSISTANT:" for shown, question, _ in rows])["input_ids"]
        answers = self.tokenizer([f" {answer}</s>" for *_, answer in rows])["input_ids"]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        shape = (size, length)
        ids, labels = torch.full(shape, self.tokenizer.pad_token_id), torch.full(shape, -100)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            end = len(p) + len(a)
            ids[row, :end] = torch.tensor(p + a)
            labels[row, len(p) : end] = torch.tensor(a)
            mask[row, :end] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}, torch.tensor(indices)


def bullets(captions: Sequence[str]) -> str:
    """Captions as a reward model reads them, one a line."""
    return "\n".join(f"- {caption}" for caption in captions)


def train_text(model: LlamaForCausalLM, lessons: Lessons, steps: tuple[int, int]) -> None:
    """Teach the language model in place to answer from captions: yes/no first, then every kind."""
    for kinds, count in ((("yes_no",), steps[0]), (KINDS, steps[1])):

        def loss_of(kinds: tuple[str, ...] = kinds) -> torch.Tensor:
            batch, _ = lessons.batch(kinds, 64, from_image=False)
            return model(**batch).loss

        train(model.parameters(), loss_of, steps=count, lr=3e-3, name=f"text {'+'.join(kinds)}")


def train_joint(
    model: LlavaForConditionalGeneration, lessons: Lessons, pixels: torch.Tensor, steps: tuple[int, int]
) -> None:
    """Align the projector alone on descriptions, then teach it and the language model every kind of question.

    The tower stays as it is, so the features of `pixels` (I, 3, SIZE, SIZE) are computed once. Three of four joint
    batches show images, the fourth keeps captions in use.
    """
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        features = torch.cat(
            [
                model.model.vision_tower(part, output_hidden_states=True).hidden_states[-1][:, 1:]
                for part in pixels.split(500)
            ]
        )

    def loss_of(kinds: tuple[str, ...], from_image: bool) -> torch.Tensor:
        batch, rows = lessons.batch(kinds, 64, from_image)
        if not from_image:
            return model(**batch).loss
        seen = BaseModelOutputWithPooling(pooler_output=list(projector(features[rows])))
        return model(**batch, mm_encoder_outputs={"image": seen}).loss

    model.requires_grad_(False)
    projector.requires_grad_(True)
    train(projector.parameters(), lambda: loss_of(("describe",), True), steps=steps[0], lr=3e-3, name="projector")
    model.requires_grad_(True)
    freeze_vision(model, projector=False)
    with_image = cycle((True, True, True, False))
    parameters = [p for p in model.parameters() if p.requires_grad]
    train(parameters, lambda: loss_of(KINDS, next(with_image)), steps=steps[1], lr=2e-3, name="together")


def evaluate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int, count: int = 300
) -> Truthfulness:
    """How true a model is about unseen images: each kind of question `count` times, sampled at temperature 1."""
    rng = random.Random(f"unseen {seed}")
    scenes = [make_scene(rng) for _ in range(count)]
    pairs = [(scene, language.ask(kind, scene, rng)) for scene in scenes for kind in KINDS]
    images = [draw(scene) for scene, _ in pairs]
    replies = generate_answers(model, processor, images, [question.text for _, question in pairs], seed=seed)
    return measure(
        [
            Answered(question.kind, question.answer_type, scene.names, *reply)
            for (scene, question), reply in zip(pairs, replies, strict=True)
        ]
    )


def make_base(output_dir: Path, seed: int, scale: float = 1.0) -> Truthfulness:
    """Make the base model in an empty folder and save it; returns how true its answers about unseen images are.

    `scale` is a factor on the number of updates and of images; 1 is what ships, the tests use less.
    """
    tower_steps, *steps = [max(1, round(scale * count)) for count in (600, 1000, 1500, 600, 1500)]
    rng = random.Random(f"base {seed}")
    scenes = [make_scene(rng) for _ in range(max(64, round(scale * 6000)))]
    image_processor = make_image_processor(SIZE)
    images = [draw(scene) for scene in scenes]
    pixels = image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws initial weights from the global generator
        tower = train_tower(scenes, pixels, tower_steps, torch.Generator().manual_seed(seed))
        lessons = Lessons(make_tokenizer(), scenes, seed)
        model, processor = join(output_dir, tower, image_processor, lessons, images[:200], pixels, steps, seed)
    return evaluate(model, processor, seed)


def make_image_processor(size: int) -> CLIPImageProcessorPil:
    """Scale images to squares of `size` pixels, and cut nothing off."""
    sides = {"height": size, "width": size}
    return CLIPImageProcessorPil(size=sides, crop_size=sides, do_center_crop=False)


def join(
    output_dir: Path,
    tower: CLIPVisionModel,
    image_processor: CLIPImageProcessorPil,
    lessons: Lessons,
    samples: list[Image.Image],
    pixels: torch.Tensor,
    steps: list[int],
    seed: int,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Teach a new language model, put it behind a taught tower, teach both together and save them.

    `steps` are those of the four lessons: yes/no about captions, all about captions, the projector, together.
    """
    with tempfile.TemporaryDirectory() as folder:
        tower.save_pretrained(f"{folder}/tower")
        image_processor.save_pretrained(f"{folder}/tower")
        language_model = make_language_model(lessons.tokenizer)
        train_text(language_model, lessons, (steps[0], steps[1]))
        language_model.save_pretrained(f"{folder}/language")
        lessons.tokenizer.save_pretrained(f"{folder}/language")
        model, processor = assemble_llava(
            f"{folder}/tower",
            f"{folder}/language",
            f"{folder}/joined",
            vision_feature_layer=-1,
            projector_init="whitened",
            sample_images=samples,
            seed=seed,
        )
    train_joint(model, lessons, pixels, (steps[2], steps[3]))
    for config in (model.config.text_config, model.config.vision_config):
        config._name_or_path = ""  # folders that are gone by now
    save_with_hub_names(model.eval(), output_dir)
    processor.save_pretrained(output_dir)
    return model, processor


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, make the base, print seed, time and quality."""
    parser = argparse.ArgumentParser(description="Make the demo's base model (7 minutes of CPU when it was made).")
    parser.add_argument("--output_dir", type=Path, required=True, help="where to save it; must be empty or absent")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty: choose another --output_dir, or empty it yourself")
    torch.set_num_threads(1)  # sums in another order would give another model
    start = time.perf_counter()
    print(f"seed {args.seed}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    quality = make_base(args.output_dir, args.seed)
    print(f"saved in {args.output_dir} after {time.perf_counter() - start:.0f} seconds; on 300 unseen images:")
    for name, value in quality.as_dict().items():
        print(f"  {name:16} {value:.3f}")


if __name__ == "__main__":
    main()
