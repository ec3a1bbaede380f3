"""What is known of each family, held against its own processor and its own model, called directly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_families import FAMILIES
from transformers import (
    AutoModelForSequenceClassification,
    AyaVisionConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.collators import PromptCollator, SFTCollator
from trl_llava.data.preference_collators import PreferenceCollator
from trl_llava.data.token_kinds import kinds_name
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.families import family_of, family_of_processor, table
from trl_llava.models.image_features import encode_images
from trl_llava.models.load import load_policy, load_processor, load_sequence_classifier
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.shared_prefix import why_not
from trl_llava.models.vision_tower import part_of
from trl_llava.ppo.decoding import why_not_static
from trl_llava.ppo.generation import Generator, suppressed_tokens
from trl_llava.ppo.passes import check_plain_head, response_logprobs, response_values
from trl_llava.ppo.setup import compile_layers
from trl_llava.prompts import JudgingPrompt, render
from trl_llava.tools.evaluate.model import Decoding, EvaluationModel

Folder = Callable[[str], Path]

IMAGES = [
    [tiny_models.image("red")],
    [],
    [tiny_models.image("blue", (30, 60)), tiny_models.image("green", (90, 20))],
    [tiny_models.image("black", (120, 100))],
]
QUESTIONS = ["What is in the picture?", "Is it true?", "Which one is red?", "Describe the image."]
ANSWERS = ["A red square.", "Yes.", "No, there is a blue circle.", "There is a green triangle in the picture."]


def rows_of(processor: ProcessorMixin) -> list[dict[str, Any]]:
    """Four rows with 1, 0, 2 and 1 images of different sizes; PaliGemma has no prompts without an image."""
    rows = []
    for i, (images, question, answer) in enumerate(zip(IMAGES, QUESTIONS, ANSWERS, strict=True)):
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        rows.append(
            {
                "row_name": f"row {i}",
                "images": images,
                "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
                "captions": ["A drawing."],
            }
        )
    return rows


def directly(processor: ProcessorMixin, row: dict[str, Any], *, with_completion: bool) -> dict[str, torch.Tensor]:
    """What the family's own processor makes of one row."""
    kwargs: dict[str, Any] = {"images": [row["images"]]} if row["images"] else {}
    family = family_of_processor(processor)
    if family is not None and family.attends_to_whole_prompt:
        if not row["images"]:
            return without_images(processor, row, with_completion=with_completion)
        # It puts BOS and the new line itself, and takes the completion apart.
        kwargs |= {"suffix": row["completion"][0]["content"][0]["text"]} if with_completion else {}
        text = processor.image_token * len(row["images"]) + row["prompt"][0]["content"][-1]["text"]
        made = processor(text=[text], **kwargs, return_tensors="pt")
        return {name: value for name, value in made.items() if name != "labels"}
    messages = [*row["prompt"], *(row["completion"] if with_completion else [])]
    text = render(processor, messages, add_generation_prompt=not with_completion)
    tokenizer = processor.tokenizer
    twice = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    made = processor(text=[text], return_tensors="pt", text_kwargs={"add_special_tokens": not twice}, **kwargs)
    return dict(made)


def without_images(
    processor: ProcessorMixin, row: dict[str, Any], *, with_completion: bool
) -> dict[str, torch.Tensor]:
    """A row of PaliGemma without images, which its processor refuses."""
    prompt, completion = row["prompt"][0]["content"][-1]["text"], row["completion"][0]["content"][0]["text"]
    tokenizer = processor.tokenizer
    made = tokenizer(
        [f"{tokenizer.bos_token}{prompt}\n"],
        *([[completion + tokenizer.eos_token]] if with_completion else []),
        return_token_type_ids=True,
        return_tensors="pt",
    )
    return dict(made)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, family_folder: Folder) -> Path:
    return family_folder(name)


@pytest.fixture
def processor(folder: Path) -> ProcessorMixin:
    return load_processor(str(folder))


def policy_of(folder: Path, **settings: Any) -> PreTrainedModel:
    return load_policy(LlavaModelConfig(model_name_or_path=str(folder), dtype="float32", **settings)).eval()


def score_model_of(folder: Path) -> PreTrainedModel:
    model = load_sequence_classifier(str(folder), LlavaModelConfig(dtype="float32")).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    return model


def make_prompts(processor: ProcessorMixin) -> ModelInputs:
    return ModelInputs.from_batch(PromptCollator(processor)(rows_of(processor)), torch.device("cpu"))


def test_it_is_known(folder: Path, processor: ProcessorMixin) -> None:
    policy = policy_of(folder)
    family = family_of(policy.config)
    assert family is not None and family is family_of_processor(processor)
    assert family.token_kinds == kinds_name(processor)
    check_plain_head(policy)


@pytest.mark.parametrize("with_completion", [False, True])
def test_every_tensor_of_the_processor_reaches_the_model(processor: ProcessorMixin, with_completion: bool) -> None:
    rows = rows_of(processor)
    collator = SFTCollator(processor) if with_completion else PromptCollator(processor)
    batch = collator(rows)
    names = set()
    for i, row in enumerate(rows):
        expected = directly(processor, row, with_completion=with_completion)
        names |= set(expected)
        real = batch["attention_mask"][i].bool()
        for key, value in expected.items():
            if value.shape == expected["input_ids"].shape:
                assert torch.equal(batch[key][i][real].long(), value[0].long()), key
        own = {key for key in expected if key not in ("input_ids", "attention_mask")}
        given = collator([row])  # a batch of its own, so that nothing is padded to another row's tiles
        assert set(given) - {"columns", "labels", "image_counts"} == own | {"input_ids", "attention_mask"}
        for key in own:
            torch.testing.assert_close(given[key].to(expected[key].dtype), expected[key], rtol=0, atol=0)
    assert set(batch) - {"columns", "labels", "image_counts"} == names


def test_rows_keep_their_own_images(processor: ProcessorMixin) -> None:
    together = make_prompts(processor)
    for i, row in enumerate(rows_of(processor)):
        own = together.select([i])
        alone = ModelInputs.from_batch(PromptCollator(processor)([row]), torch.device("cpu"))
        assert own.input_ids.tolist() == alone.input_ids.tolist()
        for key, value in alone.image_tensors().items():
            found = own.image_tensors()[key]
            assert found.shape[0] == value.shape[0]
            assert torch.equal(found[tuple(slice(size) for size in value.shape)], value)  # the rest is padding


def whole_rows(processor: ProcessorMixin) -> list[dict[str, torch.Tensor]]:
    return [directly(processor, row, with_completion=True) for row in rows_of(processor)]


def test_logits_and_gradients_are_those_of_a_direct_call(folder: Path, processor: ProcessorMixin) -> None:
    policy = policy_of(folder)
    batch = SFTCollator(processor)(rows_of(processor))
    labels = batch.pop("labels")
    logits = policy(**batch, use_cache=False).logits
    policy.zero_grad()
    loss_of(logits, labels).backward()
    ours = gradients(policy)
    policy.zero_grad()
    total = torch.zeros(())
    for i, row in enumerate(whole_rows(processor)):
        real = batch["attention_mask"][i].bool()
        expected = policy(**row, use_cache=False).logits
        torch.testing.assert_close(logits[i][real], expected[0], rtol=1e-4, atol=1e-5)
        total = total + loss_of(expected, labels[i : i + 1, real])
    total.backward()
    for key, expected in gradients(policy).items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-3, atol=1e-5)
    assert ours and not any("vision" in key or "visual" in key for key in ours)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}


def responses_of(processor: ProcessorMixin) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows whose completion is what follows the prompt in the processor's own encoding; (B, R) ids and mask."""
    rows = rows_of(processor)
    whole = [row["input_ids"][0] for row in whole_rows(processor)]
    prompts = [len(directly(processor, row, with_completion=False)["input_ids"][0]) for row in rows]
    parts = [ids[start:] for ids, start in zip(whole, prompts, strict=True)]
    width = max(map(len, parts))
    responses = torch.stack([torch.nn.functional.pad(part, (0, width - len(part))) for part in parts])
    mask = torch.stack([torch.arange(width) < len(part) for part in parts])
    return whole, responses, mask


@pytest.mark.parametrize("seen_as", ["pixels", "features"])
def test_log_probabilities_and_values_are_those_of_a_direct_call(
    folder: Path, processor: ProcessorMixin, seen_as: str
) -> None:
    policy, value = policy_of(folder), score_model_of(folder)
    for model in (policy, value):
        model.requires_grad_(False)
    inputs = make_prompts(processor)
    _, responses, mask = responses_of(processor)
    given = {
        "pixels": (inputs, inputs),
        "features": (encode_images(policy, inputs, 2), encode_images(value, inputs, 3)),
    }
    for_policy, for_value = given[seen_as]
    with torch.no_grad():
        logprobs, _ = response_logprobs(policy, for_policy, responses, mask, Sampling())
        values = response_values(value, for_value, responses, mask)
        for i, row in enumerate(whole_rows(processor)):
            length = int(mask[i].sum())
            logits = policy(**row, use_cache=False).logits[0, -length - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(-1, responses[i, :length, None])[:, 0]
            torch.testing.assert_close(logprobs[i, :length], expected, rtol=1e-4, atol=1e-5)
            hidden = value.model(**row, use_cache=False).last_hidden_state[0, -length - 1 : -1]
            torch.testing.assert_close(values[i, :length], value.score(hidden)[:, 0], rtol=1e-4, atol=1e-5)


def test_greedy_completions_are_those_of_the_models_own_generate(folder: Path, processor: ProcessorMixin) -> None:
    policy = policy_of(folder)
    args = LlavaPPOConfig("out", response_length=12, use_cpu=True, report_to="none", bf16=False)
    sampling = Sampling(suppressed=suppressed_tokens(policy))
    generator = Generator(args, Accelerator(cpu=True), processor.tokenizer, None, sampling)
    inputs = encode_images(policy, make_prompts(processor), 4)
    found = generator.generate(policy, inputs, None)
    for i, row in enumerate(rows_of(processor)):
        own = directly(processor, row, with_completion=False)
        output = policy.generate(
            **own,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=list(sampling.suppressed) or None,
        )
        assert found.responses[i].tolist() == output[0, own["input_ids"].shape[1] :].tolist(), i


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_text_behind_images_does_not_take_their_positions(folder: Path, processor: ProcessorMixin, cache: str) -> None:
    # Qwen-VL's model keeps the positions of its last images.
    policy = policy_of(folder).requires_grad_(False)
    args = LlavaPPOConfig(
        "out", response_length=6, use_cpu=True, report_to="none", bf16=False, cache_implementation=cache
    )
    generator = Generator(args, Accelerator(cpu=True), processor.tokenizer, None, Sampling())
    inputs, text = make_prompts(processor), make_prompts(processor).select([1, 1])
    responses, mask = torch.full((2, 3), 20), torch.ones(2, 3, dtype=torch.bool)

    def completed() -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, _ = response_logprobs(policy, text, responses, mask, Sampling())
        return generator.generate(policy, text, None).responses, logprobs

    with torch.no_grad():
        first = completed()
        generator.generate(policy, inputs, None)
        again = completed()
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_scores_follow_the_image_and_not_the_batch(folder: Path, processor: ProcessorMixin) -> None:
    model = score_model_of(folder)
    collator = PreferenceCollator(processor, judging_prompt=JudgingPrompt(), share_prefix=why_not(model) is None)
    rows = [
        {**row, "chosen": row["completion"], "rejected": rows_of(processor)[i - 1]["completion"]}
        for i, row in enumerate(rows_of(processor))
    ]
    with torch.no_grad():
        together = model(**collator(rows)).logits.squeeze(1)
        for i, row in enumerate(rows):
            collator.share_prefix = False
            alone = collator([row])
            copies = {"image_copies": alone.pop("image_copies")} if "image_copies" in alone else {}
            torch.testing.assert_close(
                model(**alone, **copies).logits.squeeze(1), together[[i, i + len(rows)]], rtol=1e-4, atol=1e-4
            )
        other = [{**rows[0], "images": [Image.new("RGB", rows[0]["images"][0].size, "yellow")]}]
        collator.share_prefix = False
        assert (model(**collator(other)).logits.squeeze(1) - together[[0, len(rows)]]).abs().min() > 1e-4


def test_score_models_are_registered_with_a_bias_and_come_back(folder: Path, tmp_path: Path) -> None:
    model = score_model_of(folder)
    model.score.bias.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    back, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(back) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def test_freezing_leaves_the_language_model(folder: Path) -> None:
    policy = policy_of(folder)
    frozen = [key for key, parameter in policy.named_parameters() if not parameter.requires_grad]
    trained = [key for key, parameter in policy.named_parameters() if parameter.requires_grad]
    assert frozen and all("language_model" in key or "text_model" in key or "lm_head" in key for key in trained)
    assert not any("language_model" in key or "text_model" in key for key in frozen)
    projector = policy_of(folder, freeze_projector=False)
    some = {key for key, parameter in projector.named_parameters() if parameter.requires_grad} - set(trained)
    assert some and some < set(frozen)


def test_paths_that_a_family_takes(folder: Path, processor: ProcessorMixin) -> None:
    policy = policy_of(folder)
    policy.requires_grad_(False)
    inputs = make_prompts(processor)
    found = {
        "features": encode_images(policy, inputs, 4).features is not None,
        "prefix": why_not(policy) is None,
        "static": why_not_static(policy, inputs) is None,
    }
    family = family_of(policy.config)
    expected = (True, family.shares_prefix, family.decodes_statically)
    assert tuple(found.values()) == expected


def test_the_docs_table_is_printed_from_what_is_known() -> None:
    assert table() in (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")


WRONG = {
    "pixtral": ("processor_config.json", "patch_size", 4, 8),
    "qwen2_vl": ("processor_config.json", "merge_size", 1, 2),
    "qwen2_5_vl": ("processor_config.json", "merge_size", 1, 2),
    "qwen3_vl": ("processor_config.json", "patch_size", 2, 4),
    "internvl": ("processor_config.json", "image_seq_length", 16, 4),
    "smolvlm": ("processor_config.json", "image_seq_len", 9, 4),
    "idefics3": ("processor_config.json", "image_seq_len", 9, 4),
    "gemma3": ("processor_config.json", "image_seq_length", 9, 4),
    "paligemma2": ("processor_config.json", "image_seq_length", 9, 16),
}


def replace_everywhere(config: Any, field: str, value: int) -> None:
    for key, own in config.items():
        if isinstance(own, dict):
            replace_everywhere(own, field, value)
        elif key == field:
            config[key] = value


@pytest.mark.parametrize("name", WRONG)
def test_a_processor_of_another_model_is_refused_before_any_row(
    name: str, family_folder: Folder, tmp_path: Path
) -> None:
    file, field, wrong, right = WRONG[name]
    shutil.copytree(family_folder(name), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / file).read_text())
    replace_everywhere(config, field, wrong)
    (tmp_path / file).write_text(json.dumps(config))
    expected = rf"image tokens for {field} {wrong}, .* features for {right}: set {field} to {right}"
    with pytest.raises(ValueError, match=expected):
        load_processor(str(tmp_path))


def test_a_family_that_is_not_known_is_refused_in_one_line(tmp_path: Path) -> None:
    config = AyaVisionConfig()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a aya_vision model, for which .* no score head.*Qwen2\.5-VL") as error:
        load_sequence_classifier(str(tmp_path), LlavaModelConfig())
    assert "\n" not in str(error.value)


def test_evaluated_completions_are_those_of_the_models_own_generate(folder: Path, processor: ProcessorMixin) -> None:
    model = EvaluationModel.load(str(folder), dtype="float32")
    rows = rows_of(processor)
    found = list(model.complete(rows, Decoding(max_new_tokens=12, batch_size=4)))
    for row, completion in zip(rows, found, strict=True):
        own = directly(processor, row, with_completion=False)
        settings = {"eos_token_id": model.stop_tokens, "suppress_tokens": model.suppressed or None}
        ids = model.model.generate(**own, max_new_tokens=12, do_sample=False, **settings)[0]
        text = processor.tokenizer.decode(ids[own["input_ids"].shape[1] :], skip_special_tokens=True)
        assert completion.text == text.strip(), row["row_name"]


def test_the_layers_that_are_compiled_are_the_language_models(folder: Path) -> None:
    policy = policy_of(folder)
    compile_layers(
        policy,
        SimpleNamespace(
            torch_compile=True, gradient_checkpointing=False, torch_compile_backend="eager", torch_compile_mode=None
        ),
    )
    compiled = {name for name, module in policy.named_modules() if module._compiled_call_impl is not None}
    assert len(compiled) == policy.config.get_text_config().num_hidden_layers
    assert {part_of(name) for name in compiled} == {"language model"}
