"""Loading by ID or folder: what is loaded, what is frozen, and every refusal."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)
from trl import RewardConfig, RewardTrainer

import trl_llava.models.load as models
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError
from trl_llava.models.same_tokenizer import check_same_tokenizer
from trl_llava.models.sequence_classification import LlavaForSequenceClassification


def args_for(folder: Path | str, **fields: object) -> LlavaModelConfig:
    return LlavaModelConfig(model_name_or_path=str(folder), **fields)


def test_policy_loads_in_the_configured_dtype_with_tower_and_projector_frozen(tiny_llava_dir: Path) -> None:
    model = models.load_policy(args_for(tiny_llava_dir, dtype="bfloat16", attn_implementation="eager"))
    assert type(model) is LlavaForConditionalGeneration
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("vision_tower" not in name and "multi_modal_projector" not in name), name


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (torch.device("cpu"), torch.device("cpu")),
        (torch.device("cuda"), 3),  # accelerate's device of a single process
        (torch.device("cuda", 2), 2),
    ],
)
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_goes_where_the_process_computes(
    tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch, bits: str, device: torch.device, expected: object
) -> None:
    pytest.importorskip("bitsandbytes")
    given: dict[str, object] = {}

    def stop(*_: object, **arguments: object) -> None:
        given.update(arguments)
        raise InterruptedError

    monkeypatch.setattr(PartialState(), "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(models.AutoModelForImageTextToText, "from_pretrained", stop)
    with pytest.raises(InterruptedError):
        models.load_policy(args_for(tiny_llava_dir, dtype="bfloat16", **{bits: True}))
    assert given["device_map"] == {"": expected}


@pytest.mark.parametrize("pad_to_square", [None, True])
def test_pixels_are_pils_whatever_is_installed(
    tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pad_to_square: bool | None
) -> None:
    processor = models.load_processor(str(tiny_llava_dir), pad_to_square=pad_to_square)
    assert processor.image_processor.backend == "pil"
    processor.save_pretrained(tmp_path / "saved")
    # A machine with torchvision reads the same file as its own class: no file names a backend.
    assert "Pil" not in (tmp_path / "saved" / "processor_config.json").read_text()
    again = models.load_processor(str(tmp_path / "saved"))
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    monkeypatch.setattr(type(processor.image_processor), "backend", "torchvision")  # plays such a machine
    monkeypatch.setattr(models, "load_image_processor", lambda *_: again.image_processor)
    assert models.load_processor(str(tiny_llava_dir)).image_processor is again.image_processor


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_every_family_loads_as_policy_and_as_classifier(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{family}_dir")
    policy = models.load_policy(args_for(folder))
    classifier = models.load_sequence_classifier(str(folder), args_for(folder))
    assert classifier.config.num_labels == 1
    assert not any(p.requires_grad for n, p in classifier.named_parameters() if "vision_tower" in n)
    assert classifier.score.weight.requires_grad
    for name, value in policy.model.state_dict().items():
        assert torch.equal(classifier.model.state_dict()[name], value), name


def test_projector_trains_where_it_is_not_frozen(tiny_llava_dir: Path) -> None:
    model = models.load_policy(args_for(tiny_llava_dir, freeze_projector=False))
    assert model.model.multi_modal_projector.linear_1.weight.requires_grad
    assert not next(model.model.vision_tower.parameters()).requires_grad


def test_new_head_is_seeded_and_its_bias_is_zero(tiny_llava_dir: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.rand(1)  # the global generator must not matter
        heads.append(models.load_sequence_classifier(str(tiny_llava_dir), args_for(tiny_llava_dir), seed=seed).score)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].bias.tolist() == [0.0]
    assert heads[0].weight.std().item() == pytest.approx(0.1, rel=0.4)  # the tiny model's initializer_range


def test_missing_head_is_an_error_for_scoring(tiny_llava_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no score head \(score.bias, score.weight not in its checkpoint, "):
        models.load_sequence_classifier(str(tiny_llava_dir), args_for(tiny_llava_dir), new_head=False)
    trained = models.load_sequence_classifier(str(tiny_llava_dir), args_for(tiny_llava_dir), seed=3)
    trained.save_pretrained(tmp_path)
    loaded = models.load_sequence_classifier(str(tmp_path), args_for(tiny_llava_dir), new_head=False)
    assert torch.equal(loaded.score.weight, trained.score.weight)


def test_incomplete_checkpoint_is_an_error(tiny_llava_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llava_dir / "config.json").read_bytes())
    weights = load_file(tiny_llava_dir / "model.safetensors")
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (
        lambda: models.load_policy(args_for(tmp_path)),
        lambda: models.load_sequence_classifier(str(tmp_path), args_for(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"1 missing keys, first model.multi_modal_projector.linear_1.bias"):
            load()


def test_trls_own_reward_trainer_loads_our_model_by_folder(tiny_llava_dir: Path, tmp_path: Path) -> None:
    trainer = RewardTrainer(
        model=str(tiny_llava_dir),
        args=RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_dict({"chosen": ["Yes, a red one"], "rejected": ["No"]}),
        processing_class=AutoTokenizer.from_pretrained(tiny_llava_dir),
    )
    assert type(trainer.model) is LlavaForSequenceClassification
    assert trainer.model.config.num_labels == 1


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-folder", "/no/such/folder"])
def test_model_that_does_not_exist_is_named_with_the_fix(name: str, tiny_llava_dir: Path) -> None:
    fix = "there is no such folder" if name.startswith("/") else "hf download"
    with pytest.raises(OSError, match=rf"model_name_or_path: cannot load '{name}'.*{fix}"):
        models.load_policy(args_for(name))
    with pytest.raises(OSError, match=rf"cannot load '{name}'"):
        models.load_sequence_classifier(name, args_for(tiny_llava_dir))
    with pytest.raises(OSError, match=rf"^sft_model_path: cannot load '{name}'"):
        models.load_processor(name, field="sft_model_path")


def test_no_model_name_is_named() -> None:
    with pytest.raises(ValueError, match="model_name_or_path is not set"):
        models.load_policy(LlavaModelConfig())


def test_text_only_model_is_no_policy(tiny_llama_dir: Path) -> None:
    with pytest.raises(ValueError, match="is a llama model, which does not take images"):
        models.load_policy(args_for(tiny_llama_dir))


def test_family_without_score_head_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="is a clip model, for which there is no score head"):
        models.load_sequence_classifier(str(tmp_path), args_for(tmp_path))


def test_adapter_folder_as_model_names_both_fields(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    with pytest.raises(
        ValueError, match=r"Set model_name_or_path to its base \('org/base'\) and adapter_name_or_path"
    ):
        models.load_policy(args_for(tmp_path))


def test_processor_is_loaded_as_it_was_saved(tiny_llava_dir: Path) -> None:
    processor = models.load_processor(str(tiny_llava_dir))
    assert processor.chat_template == AutoProcessor.from_pretrained(tiny_llava_dir).chat_template
    assert not processor.image_processor.do_pad
    assert models.load_processor(str(tiny_llava_dir), pad_to_square=True).image_processor.do_pad


IMAGE_TOKENS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def changed(base: Path, folder: Path, file: str, **values: object) -> Path:
    """A copy of a model with other values in one of its files; None takes a field out."""
    shutil.copytree(base, folder)
    fields = {**json.loads((folder / file).read_text()), **values}
    (folder / file).write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return folder


@pytest.mark.parametrize("missing", [IMAGE_TOKENS, IMAGE_TOKENS[2:]])
@pytest.mark.parametrize("family", ["tiny_llava_dir", "tiny_llava_next_dir"])
def test_what_older_processors_lack_is_taken_from_the_models_config(
    family: str, missing: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(family)
    older = changed(base, tmp_path / "older", "processor_config.json", **dict.fromkeys(missing))
    read, expected = models.load_processor(str(older)), models.load_processor(str(base))
    assert [getattr(read, field) for field in IMAGE_TOKENS] == [getattr(expected, field) for field in IMAGE_TOKENS]


def test_more_image_tokens_than_features_are_refused(tiny_llava_dir: Path, tmp_path: Path) -> None:
    full = changed(tiny_llava_dir, tmp_path / "full", "config.json", vision_feature_select_strategy="full")
    problem = "makes 16 image tokens of 28x28 pixels, the model 17 features: set patch_size to 7, .*to 'full', .* to 1"
    with pytest.raises(InputError, match=problem):
        models.load_processor(str(full))


@pytest.mark.parametrize("layer", [-4, 3, [-2, 7]])
def test_a_layer_that_the_tower_has_not_is_refused(tiny_llava_dir: Path, tmp_path: Path, layer: int | list) -> None:
    folder = changed(tiny_llava_dir, tmp_path / "deep", "config.json", vision_feature_layer=layer)
    with pytest.raises(InputError, match=r"is .*, but its tower has 2 layers: expected -3 to 2"):
        models.load_processor(str(folder))


def test_tokens_without_an_embedding_are_refused(tiny_llava_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "added"
    shutil.copytree(tiny_llava_dir, folder)
    processor = models.load_processor(str(folder))
    processor.tokenizer.add_tokens(["<box>"])
    processor.save_pretrained(folder)
    with pytest.raises(InputError, match=r"added has 601 tokens, the model 600 embeddings: resize them"):
        models.load_processor(str(folder))


def test_nor_may_an_adapters_tokenizer_have_more_tokens_than_its_base_has_embeddings(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llava_dir, tmp_path / "base")
    adapter = tmp_path / "adapter"
    processor = models.load_processor(str(tiny_llava_dir))
    processor.save_pretrained(adapter)
    LoraConfig(base_model_name_or_path="base").save_pretrained(adapter)  # relative to where it was trained
    assert len(models.load_processor(str(adapter)).tokenizer) == 600
    processor.tokenizer.add_tokens(["<box>"])
    processor.save_pretrained(adapter)
    with pytest.raises(InputError, match=r"adapter has 601 tokens, the model 600 embeddings: resize them"):
        models.load_processor(str(adapter))


def test_processor_of_a_text_model_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(ValueError, match="has no image processor"):
        models.load_processor(str(tiny_llama_dir))


def test_processor_names_every_missing_part(tiny_llava_dir: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    processor.chat_template = processor.tokenizer.chat_template = None
    processor.tokenizer.pad_token = None
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no chat template \(chat_template.jinja\), pad token\."):
        models.load_processor(str(tmp_path))


def test_quantisation_without_bitsandbytes_names_the_extra(
    tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"load_in_8bit needs bitsandbytes.*pip install trl-llava\[qlora\]"):
        models.load_policy(args_for(tiny_llava_dir, load_in_8bit=True))


def test_4_bit_needs_a_dtype(tiny_llava_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="set dtype to bfloat16"):
        models.load_policy(args_for(tiny_llava_dir, load_in_4bit=True, dtype="auto"))


def test_4_bit_quantises_the_language_model_only(tiny_llava_dir: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    args = args_for(tiny_llava_dir, load_in_4bit=True, dtype="bfloat16")
    for model in (models.load_policy(args), models.load_sequence_classifier(str(tiny_llava_dir), args)):
        quantised = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
        assert len(quantised) == 14  # 7 linears in each of 2 layers
        assert all(name.startswith("model.language_model.layers.") for name in quantised)
    assert model.score.weight.dtype == torch.bfloat16
    ids = torch.tensor([[1, 300, 301]])
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_4_bit_on_the_cpu_still_has_gradients_after_a_rollout(tiny_llava_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = models.load_policy(args_for(tiny_llava_dir, load_in_4bit=True, dtype="bfloat16")).eval()
    embeddings = model.get_input_embeddings().weight

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=torch.tensor([[1, 300, 301]])).logits.float().square().sum().backward()
        return embeddings.grad.clone()

    before = gradient()
    with torch.no_grad():  # here bitsandbytes would repack the weights on CPUs with AVX512-BF16
        model(inputs_embeds=embeddings.detach()[None, 300:303])
    assert torch.equal(gradient(), before)
    assert before.abs().max() > 0


def test_8_bit_loads(tiny_llava_dir: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = models.load_policy(args_for(tiny_llava_dir, load_in_8bit=True, dtype="bfloat16"))
    assert sum(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules()) == 14


def test_value_model_with_another_tokenizer_is_refused(tiny_llava_dir: Path) -> None:
    ours, theirs = (AutoProcessor.from_pretrained(tiny_llava_dir) for _ in range(2))
    check_same_tokenizer(ours, theirs, "value_model")
    theirs.tokenizer.pad_token = "<unk>"
    with pytest.raises(ValueError, match="policy and value_model do not fit together: pad_token_id is 3"):
        check_same_tokenizer(ours, theirs, "value_model")
    theirs.tokenizer = tiny_models.tiny_tokenizer(500)
    with pytest.raises(ValueError, match=r"the ID of token '.*' is .* for the policy"):
        check_same_tokenizer(ours, theirs, "value_model")


def test_tiny_tokenizer_reads_like_llamas(tiny_llava_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llava_dir)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("USER: <image>\nIs").input_ids)
    assert tokens[:6] == ["<s>", "▁USER", ":", "▁", "<image>", "▁"]
    assert tokens[6] == "<0x0A>"
