"""Score-head models: pooling, images shared by stacked rows, loading and saving, TRL's access pattern."""

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    PreTrainedModel,
)
from trl.experimental.utils import get_reward

from trl_llava.models.sequence_classification import LlavaForSequenceClassification, last_token_index

FAMILIES = ("llava", "llava_next", "llava_onevision")


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_dir")


def load(folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()


def batch_of(folder: Path, side: str, texts: list[str], colors: list[str]) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = side
    images = [tiny_models.image(color, (40 + 8 * i, 32)) for i, color in enumerate(colors)]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


def test_last_token_index_is_the_docstrings() -> None:
    assert last_token_index(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])).tolist() == [1, 3]
    assert last_token_index(torch.tensor([[False, True, True, False]])).tolist() == [2]


def test_score_is_the_last_real_tokens_under_any_padding_side(folder: Path) -> None:
    model = load(folder)
    texts = [
        "USER: <image>\nWhat is it? ASSISTANT: a red square on a table</s>",
        "USER: <image>\nWhat? ASSISTANT: Yes</s>",
    ]
    colors = ["red", "blue"]
    alone = []
    for i in (0, 1):  # a batch of one, made like the batch so that tiling families get the same tiles
        inputs = batch_of(folder, "right", texts, colors)
        keep = inputs["attention_mask"][i].bool()
        inputs = {
            "input_ids": inputs["input_ids"][i : i + 1, keep],
            **{k: v[i : i + 1] for k, v in inputs.items() if k not in ("input_ids", "attention_mask")},
        }
        alone.append(model(**inputs).logits.item())
    right = model(**batch_of(folder, "right", texts, colors)).logits
    left = model(**batch_of(folder, "left", texts, colors)).logits
    assert right.shape == (2, 1)
    assert right.squeeze(1).tolist() == pytest.approx(alone, abs=2e-6)
    assert left.squeeze(1).tolist() == pytest.approx(alone, abs=2e-6)
    assert abs(alone[0] - alone[1]) > 1e-3


def test_pad_token_inside_the_text_does_not_move_the_pooled_token(tiny_llava_dir: Path) -> None:
    model = load(tiny_llava_dir)
    ids = torch.tensor([[1, 300, 301, 3], [1, 300, 301, 302]])  # 3 is the pad token, here a real last token
    mask = torch.ones_like(ids)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = model.score(hidden[:, -1])
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_several_rows_without_a_mask_are_refused(tiny_llava_dir: Path) -> None:
    with pytest.raises(ValueError, match="attention_mask is missing for a batch of 2 rows"):
        load(tiny_llava_dir)(input_ids=torch.tensor([[1, 300], [1, 3]]))


def test_head_has_a_bias_that_counts(tiny_llava_dir: Path) -> None:
    model = load(tiny_llava_dir)
    ids = torch.tensor([[1, 300, 301]])
    before = model(input_ids=ids).logits.item()
    torch.nn.init.constant_(model.score.bias, 2.5)
    assert model(input_ids=ids).logits.item() == pytest.approx(before + 2.5)


def test_stacked_rows_encode_each_image_once_and_score_the_same(folder: Path) -> None:
    model = load(folder)
    texts = ["USER: <image>\nWhat? ASSISTANT: No</s>", "USER: <image>\nWhat? ASSISTANT: a blue one</s>"]
    pair = batch_of(folder, "right", texts, ["red", "blue"])
    stacked = {k: torch.cat([v, v]) for k, v in pair.items()}
    stacked["input_ids"][2:, 1] = 305  # the second half is another text
    calls: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    expected = model(**stacked).logits
    shared = {**pair, "input_ids": stacked["input_ids"], "attention_mask": stacked["attention_mask"]}
    found = model(**shared, image_copies=2).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found[0].item() != found[2].item()
    assert calls[1] * 2 == calls[0]  # half as many images went through the tower

    features = model.model.get_image_features(
        **{k: v for k, v in pair.items() if k not in ("input_ids", "attention_mask")}, return_dict=True
    )
    ids = {k: stacked[k] for k in ("input_ids", "attention_mask")}
    again = model(**ids, mm_encoder_outputs={"image": features}, image_copies=2).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-6)


def test_rows_that_do_not_divide_by_image_copies_are_refused(tiny_llava_dir: Path) -> None:
    ids = torch.ones(3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="image_copies=2 does not divide the batch of 3 rows"):
        load(tiny_llava_dir)(input_ids=ids, attention_mask=ids, image_copies=2)


def test_image_gradients_sum_over_the_copies(tiny_llava_dir: Path) -> None:
    text = "USER: <image>\nWhat? ASSISTANT: No</s>"
    pair = batch_of(tiny_llava_dir, "right", [text], ["red"])
    grads = []
    for copies in (1, 2):
        model = load(tiny_llava_dir)
        inputs = {k: torch.cat([v] * copies) for k, v in pair.items() if k != "pixel_values"}
        model(**inputs, pixel_values=pair["pixel_values"], image_copies=copies).logits.sum().backward()
        grads.append(model.model.multi_modal_projector.linear_2.weight.grad)
    torch.testing.assert_close(grads[1], 2 * grads[0])


def test_mixed_batch_and_text_only_batch(folder: Path) -> None:
    model = load(folder)
    texts = ["USER: <image>\nWhat? ASSISTANT: No</s>", "USER: What is up? ASSISTANT: Nothing much</s>"]
    mixed = model(**batch_of(folder, "right", texts, ["red"])).logits
    text_only = model(**batch_of(folder, "right", texts[1:], [])).logits
    assert mixed[1].item() == pytest.approx(text_only[0].item(), abs=2e-6)


def test_labels_give_a_loss_and_tuples_come_on_request(tiny_llava_dir: Path) -> None:
    model = load(tiny_llava_dir)
    ids = torch.tensor([[1, 300, 301]])
    logit = model(input_ids=ids).logits.item()
    loss = model(input_ids=ids, labels=torch.tensor([[1.0]])).loss
    assert loss.item() == pytest.approx((logit - 1) ** 2, rel=1e-5)
    assert model(input_ids=ids, return_dict=False)[0].item() == logit


def test_trl_reads_scores_from_it_as_from_any_reward_model(tiny_llava_dir: Path) -> None:
    model = load(tiny_llava_dir)
    ids = torch.tensor([[3, 1, 300, 301, 302, 3], [1, 310, 300, 301, 302, 303]])
    logits, scores, lengths = get_reward(model, ids, pad_token_id=3, context_length=3)
    expected = model(input_ids=ids, attention_mask=ids != 3).logits.squeeze(1)
    assert logits.shape == (2, 6, 1)
    assert lengths.tolist() == [4, 5]
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-6)


def test_checkpoint_in_the_hubs_old_layout_loads_into_policy_and_classifier(folder: Path, tmp_path: Path) -> None:
    policy = AutoModelForImageTextToText.from_pretrained(folder)
    old = {}
    for key, value in policy.state_dict().items():
        key = key.removeprefix("model.")
        key = key.replace("language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")
        key = key.replace("vision_tower.", "vision_tower.vision_model.")
        old[key] = value.clone()
    assert any(key.startswith("vision_tower.vision_model.encoder.layers.0") for key in old)
    policy.config.save_pretrained(tmp_path)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, policy_info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=1, output_loading_info=True
    )
    assert set(policy_info["missing_keys"]) == set() == set(policy_info["unexpected_keys"])
    assert set(info["missing_keys"]) == {"score.weight", "score.bias"}
    assert set(info["unexpected_keys"]) == set()
    for key, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
        if not key.startswith("lm_head"):
            assert torch.equal(classifier.state_dict()[key], value), key


def test_saved_and_loaded_again_it_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    torch.nn.init.constant_(model.score.bias, 0.25)
    model.save_pretrained(tmp_path)
    names = load_file(folder / "model.safetensors").keys() - {"language_model.lm_head.weight"}
    assert load_file(tmp_path / "model.safetensors").keys() == names | {"score.weight", "score.bias"}
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(again) is type(model)
    assert again.config.num_labels == 1
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_auto_class_finds_ours(tiny_llava_dir: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llava_dir, num_labels=1)
    assert type(model) is LlavaForSequenceClassification
    assert model.base_model_prefix == "model"
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.config.num_labels == 1
