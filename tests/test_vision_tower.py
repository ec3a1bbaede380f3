"""Assembled LLaVAs use their images, reload bit for bit, and refuse parts that do not fit."""

from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from trl_llava.models.assemble import assemble_llava
from trl_llava.models.load import load_processor
from trl_llava.models.vision_tower import freeze_vision, set_square_padding

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }} {% endfor %}{% endfor %}"
)
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


def random_images(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 28, 28, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture(scope="module")
def language_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    words = ["<unk>", "</s>", "user", "what", "is", "this"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    size = {"height": 28, "width": 28}
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(root / "clip")
    SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(root / "siglip")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
    CLIPModel(CLIPConfig(vision_config=TOWER, text_config=text)).save_pretrained(root / "whole_clip")
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(root / "clip")
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(root / "whole_clip")
    SiglipImageProcessor(size=size).save_pretrained(root / "siglip")
    return root


def ask(model, processor, images):
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}]
    text = processor.apply_chat_template(conversation)
    inputs = processor(text=[text] * len(images), images=images, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(
    ("tower", "strategy", "layer", "tokens"),
    [("clip", "default", -2, 16), ("clip", "full", -1, 17), ("siglip", "full", -1, 16), ("whole_clip", None, -2, 16)],
)
def test_an_assembled_llava_sees_and_reloads_bit_for_bit(
    tower_dirs, language_dir, tmp_path, tower, strategy, layer, tokens
):
    model, processor = assemble_llava(
        str(tower_dirs / tower),
        str(language_dir),
        tmp_path / "out",
        vision_feature_layer=layer,
        select_strategy=strategy,
        chat_template=TEMPLATE,
    )
    assert tiny_models.image_token_count(processor, (28, 28)) == tokens
    assert tiny_models.image_token_count(processor, (50, 20)) == tokens
    assert model.config.image_seq_length == tokens
    assert model.config.image_token_id == 6  # added behind the 6 known words
    assert processor.tokenizer.pad_token == "<pad>"
    assert model.get_input_embeddings().weight.shape == (8, 16)
    two = random_images(2)
    logits = ask(model, processor, two)
    assert not torch.equal(logits[0], logits[1])  # the image matters

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:  # named as on the Hub; vLLM takes no others
        parts = {name.rpartition("embeddings")[0] for name in set(file.keys()) if "patch_embedding" in name}
    assert parts == {"vision_tower.vision_model."}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert torch.equal(ask(again, load_processor(str(tmp_path / "out")), two), logits)


def test_the_tower_inside_a_whole_clip_model_is_taken(tower_dirs, language_dir, tmp_path):
    model, _ = assemble_llava(
        str(tower_dirs / "whole_clip"), str(language_dir), tmp_path / "out", chat_template=TEMPLATE
    )
    tower = CLIPModel.from_pretrained(tower_dirs / "whole_clip").vision_model
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, model.model.vision_tower.state_dict()[name]), name


def test_the_projector_repeats_with_its_seed(tower_dirs, language_dir, tmp_path):
    parts = (str(tower_dirs / "clip"), str(language_dir))
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        model, _ = assemble_llava(*parts, tmp_path / name, chat_template=TEMPLATE, seed=seed)
        weights.append(model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_whitened_projector_gives_the_gelu_unit_scale(tower_dirs, language_dir, tmp_path):
    images = random_images(40)
    model, processor = assemble_llava(
        str(tower_dirs / "clip"),
        str(language_dir),
        tmp_path / "out",
        chat_template=TEMPLATE,
        projector_init="whitened",
        sample_images=images,
    )
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        before_gelu = projector.linear_1(features).reshape(-1, 16)
        words = model.get_input_embeddings().weight
        scale = float(projector(features).std() / words.std())
    assert before_gelu.mean(dim=0).abs().max() < 1e-3
    assert (before_gelu.std(dim=0) - 1).abs().max() < 1e-3
    assert abs(scale - 1) < 1e-3


def test_parts_that_do_not_fit_are_refused(tower_dirs, language_dir, tmp_path):
    siglip, clip, language = str(tower_dirs / "siglip"), str(tower_dirs / "clip"), str(language_dir)
    with pytest.raises(ValueError, match=r'no class token.*"full"'):
        assemble_llava(siglip, language, tmp_path / "a", select_strategy="default", chat_template=TEMPLATE)
    with pytest.raises(ValueError, match="has no chat template"):
        assemble_llava(clip, language, tmp_path / "a")
    with pytest.raises(ValueError, match="needs sample_images"):
        assemble_llava(clip, language, tmp_path / "a", chat_template=TEMPLATE, projector_init="whitened")
    with pytest.raises(ValueError, match=r"1 sample images give 16 patches, fewer than the 32"):
        wide = tmp_path / "wide"
        CLIPVisionModel(CLIPVisionConfig(**{**TOWER, "hidden_size": 32})).save_pretrained(wide)
        CLIPImageProcessor.from_pretrained(clip).save_pretrained(wide)
        assemble_llava(
            str(wide),
            language,
            tmp_path / "a",
            chat_template=TEMPLATE,
            projector_init="whitened",
            sample_images=random_images(1),
        )
    with pytest.raises(ValueError, match="expected a CLIP or SigLIP vision tower"):
        assemble_llava(language, language, tmp_path / "a", chat_template=TEMPLATE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not empty"):
        assemble_llava(clip, language, tmp_path / "full", chat_template=TEMPLATE)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"


def test_freezing_takes_tower_and_projector_and_nothing_else(tower_dirs, language_dir, tmp_path):
    model, _ = assemble_llava(str(tower_dirs / "clip"), str(language_dir), tmp_path / "out", chat_template=TEMPLATE)
    freeze_vision(model, tower=True, projector=False)
    assert all(p.requires_grad for p in model.model.multi_modal_projector.parameters())
    freeze_vision(model)
    parts = [model.model.vision_tower, model.model.multi_modal_projector]
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert all(p.requires_grad for p in model.model.language_model.parameters())
    with pytest.raises(ValueError, match="LlamaModel has no vision tower to freeze"):
        freeze_vision(model.model.language_model)


def test_square_padding_fills_with_the_image_mean(tower_dirs, language_dir, tmp_path):
    _, processor = assemble_llava(
        str(tower_dirs / "clip"), str(language_dir), tmp_path / "out", chat_template=TEMPLATE
    )
    set_square_padding(processor, True)
    wide = Image.new("RGB", (56, 28), "white")
    pixels = processor.image_processor(wide, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 28, 28)
    assert pixels[:, :6].abs().max() < 0.05  # the border is 0 after normalisation, up to rounding and resizing
    assert pixels[:, 10:18].min() > 1.5
    processor.save_pretrained(tmp_path / "padded")
    again = load_processor(str(tmp_path / "padded"))
    assert again.image_processor.do_pad is True
    assert torch.equal(again.image_processor(wide, return_tensors="pt")["pixel_values"][0], pixels)
    set_square_padding(processor, False)
    assert processor.image_processor(wide, return_tensors="pt")["pixel_values"][0].min() > 1.5
    processor.image_processor = SiglipImageProcessor()
    with pytest.raises(ValueError, match=r"SiglipImageProcessor.* cannot pad to a square"):
        set_square_padding(processor, True)


def test_a_processor_that_makes_tiles_pads_to_no_square(
    tiny_llava_next_dir: Path, tiny_llava_onevision_dir: Path
) -> None:
    """OneVision's has a method of that name, but its `do_pad` gives the images of a batch as many tiles each."""
    for folder in (tiny_llava_onevision_dir, tiny_llava_next_dir):
        processor = AutoProcessor.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"ImageProcessor\w* cannot pad to a square; expected a CLIP or LLaVA"):
            set_square_padding(processor, True)
        set_square_padding(processor, False)
        assert processor.image_processor.do_pad is True
