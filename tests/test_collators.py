"""The three collators: their docstrings' examples, labels, lengths, and batches of every mixture on tiny models."""

import doctest

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from trl_llava.data import collators, preference_collators
from trl_llava.data.collators import PromptCollator, SFTCollator
from trl_llava.data.contract import RowError
from trl_llava.data.preference_collators import DPOCollator, PreferenceCollator
from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE, VICUNA_V1_SYSTEM, JudgingPrompt

PICTURE = {"type": "image", "text": None}
VOCABULARY = ["<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", "Hi", "What", "cat", "dog", "<unk>"]


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


@pytest.fixture
def word_processor():
    """Words are tokens, a picture of 4x4 pixels takes four; vicuna_v1 without its system text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    images = LlavaImageProcessorPil(size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4})
    template = VICUNA_V1_CHAT_TEMPLATE.replace(VICUNA_V1_SYSTEM, "")
    return LlavaProcessor(images, fast, patch_size=2, vision_feature_select_strategy="full", chat_template=template)


@pytest.fixture
def vicuna(tiny_processor):
    tiny_processor.chat_template = VICUNA_V1_CHAT_TEMPLATE
    return tiny_processor


@pytest.fixture
def rows(red_image):
    """One row with a picture and two turns, one without a picture."""
    return [
        {
            "row_name": "a[0]",
            "images": [red_image],
            "prompt": [user(PICTURE, text("What is it?")), assistant("A red square."), user(text("Yes?"))],
            "completion": [assistant("Yes, there is a red square.")],
            "chosen": [assistant("Yes, there is.")],
            "rejected": [assistant("No, there is a blue circle.")],
            "captions": ["a red square", "a square on a wall"],
        },
        {
            "row_name": "a[1]",
            "images": [],
            "prompt": [user(text("Is there a circle?"))],
            "completion": [assistant("No.")],
            "chosen": [assistant("No.")],
            "rejected": [assistant("Yes, a green triangle.")],
            "captions": ["nothing to see"],
        },
    ]


@pytest.mark.parametrize("collator", [PromptCollator, SFTCollator, PreferenceCollator, DPOCollator])
def test_docstring_examples_are_what_comes_out(collator, word_processor):
    names = {**vars(collators), **vars(preference_collators)}
    names |= {"processor": word_processor, "red": Image.new("RGB", (4, 4), "red")}
    find = doctest.DocTestFinder(recurse=False).find
    if collator is DPOCollator:  # reads the rows of the other example
        (rows,) = find(PreferenceCollator, globs=names)
        exec(rows.examples[0].source, names)
    (example,) = find(collator, globs=names)
    assert len(example.examples) >= 4
    assert doctest.DocTestRunner().run(example).failed == 0


def test_sft_labels_every_answer_and_its_stop_token(vicuna, rows):
    batch = SFTCollator(vicuna)(rows)
    learned = [vicuna.tokenizer.convert_ids_to_tokens(row[row >= 0]) for row in batch["labels"]]
    assert learned[0] == [
        *["▁A", "▁red", "▁square", ".", "</s>"],
        *["▁Yes", ",", "▁there", "▁is", "▁a", "▁red", "▁square", ".", "</s>"],
    ]
    assert learned[1] == ["▁N", "o", ".", "</s>"]
    assert batch["attention_mask"][1].sum() < batch["attention_mask"].shape[1]
    assert (batch["input_ids"][1][batch["attention_mask"][1] == 0] == vicuna.tokenizer.pad_token_id).all()


def test_sft_labels_on_completion_and_on_all(vicuna, rows):
    completion = SFTCollator(vicuna, labels_on="completion")(rows)["labels"][0]
    assert vicuna.tokenizer.decode(completion[completion >= 0]) == "Yes, there is a red square.</s>"
    batch = SFTCollator(vicuna, labels_on="all")(rows)
    unlearned = batch["labels"] == -100
    assert (unlearned == ((batch["input_ids"] == vicuna.image_token_id) | (batch["attention_mask"] == 0))).all()


def test_preference_stacks_chosen_then_rejected_and_encodes_images_once(vicuna, rows):
    batch = PreferenceCollator(vicuna)(rows)
    texts = [vicuna.tokenizer.decode(row, skip_special_tokens=True) for row in batch["input_ids"]]
    assert [text.split("ASSISTANT: ")[-1] for text in texts] == [
        *["Yes, there is.", "No."],
        *["No, there is a blue circle.", "Yes, a green triangle."],
    ]
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    assert batch["image_copies"] == 2
    assert "margin" not in batch
    last = [row[mask == 1][-1] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert last == [vicuna.tokenizer.eos_token_id] * 4


def test_a_packed_pair_holds_both_answers_behind_their_common_prefix(vicuna, rows):
    plain, packed = PreferenceCollator(vicuna)(rows), PreferenceCollator(vicuna, share_prefix=True)(rows)
    assert packed["input_ids"].shape[0] == 2 and "image_copies" not in packed
    assert torch.equal(packed["pixel_values"], plain["pixel_values"])
    for half in (0, 1):
        for row in (0, 1):
            ids, segments = packed["input_ids"][row], packed["segments"][row]
            real = plain["attention_mask"][row + 2 * half] == 1
            own = (segments == 0) | (segments == half + 1)
            assert torch.equal(ids[own], plain["input_ids"][row + 2 * half][real])
            assert packed["position_ids"][row][own].tolist() == list(range(int(real.sum())))
    assert torch.equal(packed["attention_mask"] == 0, packed["segments"] == -1)


def test_judged_preference_ends_with_the_open_judgement_and_one_caption_order(vicuna, rows):
    batch = PreferenceCollator(vicuna, judging_prompt=JudgingPrompt())(rows)
    texts = [
        vicuna.tokenizer.decode(row[mask == 1])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert all(text.endswith("the quality score of my last response is") for text in texts)
    judging = [text.split("Please evaluate")[1] for text in texts]
    assert judging[0] == judging[2] and judging[1] == judging[3]
    assert "  - a red square\n" in judging[0] and "  - nothing to see\n" in judging[1]


def test_preference_margin(vicuna, rows):
    margins = PreferenceCollator(vicuna)([{**rows[0], "margin": 0.5}, {**rows[1], "margin": 2}])["margin"]
    assert margins.tolist() == [0.5, 2.0] and margins.dtype == torch.float32
    with pytest.raises(RowError, match=r"a\[1\]: it has no margin"):
        PreferenceCollator(vicuna)([{**rows[0], "margin": 0.5}, {**rows[1], "margin": None}])


@pytest.mark.parametrize("captions", [[], None])
def test_judging_without_captions_names_the_row(vicuna, rows, captions):
    rows[1]["captions"] = captions
    with pytest.raises(RowError, match=r"a\[1\]: it has no captions.*with_captions to false"):
        PreferenceCollator(vicuna, judging_prompt=JudgingPrompt())(rows)
    batch = PreferenceCollator(vicuna, judging_prompt=JudgingPrompt(with_captions=False))(rows)
    assert len(batch["input_ids"]) == 4


def test_prompts_are_left_padded_and_carry_their_columns(vicuna, rows):
    batch = PromptCollator(vicuna)(rows)
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["attention_mask"][1, 0] == 0
    assert all(vicuna.tokenizer.decode(row).endswith(" ASSISTANT:") for row in batch["input_ids"])
    columns = batch["columns"]
    assert columns["prompts"] == [row["prompt"] for row in rows]
    assert [len(images) for images in columns["images"]] == [1, 0]
    assert columns["images"][0][0].mode == "RGB"
    assert columns["captions"] == [["a red square", "a square on a wall"], ["nothing to see"]]
    assert set(PromptCollator(vicuna, columns=("captions",))(rows)["columns"]) == {"prompts", "images", "captions"}


@pytest.mark.parametrize("collator", [PromptCollator, SFTCollator, PreferenceCollator])
def test_text_only_batch_has_no_image_tensors(vicuna, rows, collator):
    batch = collator(vicuna)(rows[1:])
    assert not {"pixel_values", "image_sizes", "image_copies"} & set(batch)


@pytest.mark.parametrize("collator", [PromptCollator, SFTCollator, PreferenceCollator])
def test_text_only_tokenizer(tiny_llama_dir, rows, collator):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = VICUNA_V1_CHAT_TEMPLATE
    batch = collator(tokenizer)(rows[1:])
    assert "USER: Is there a circle? ASSISTANT:" in tokenizer.decode(batch["input_ids"][0])
    with pytest.raises(ValueError, match="has no `image_token`"):
        collator(tokenizer)(rows)


@pytest.mark.parametrize(
    ("collator", "option"),
    [
        (PromptCollator, "max_prompt_length"),
        (SFTCollator, "max_length"),
        (PreferenceCollator, "max_length"),
    ],
)
def test_overlong_row_is_an_error_that_names_length_and_option(vicuna, rows, collator, option):
    length = collator(vicuna)(rows[:1])["input_ids"].shape[1]
    assert collator(vicuna, **{option: length})(rows[:1])["input_ids"].shape[1] == length
    with pytest.raises(RowError, match=rf"a\[0\]: it has {length} tokens, {option} allows {length - 1}"):
        collator(vicuna, **{option: length - 1})(rows)


def test_pad_to_multiple_of(vicuna, rows):
    assert SFTCollator(vicuna, pad_to_multiple_of=64)(rows)["labels"].shape == (2, 128)
    assert PreferenceCollator(vicuna, pad_to_multiple_of=64)(rows)["input_ids"].shape == (4, 128)


def test_missing_pad_token_is_an_error(vicuna, rows):
    vicuna.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no pad token"):
        SFTCollator(vicuna)(rows)


def test_unreadable_image_names_the_row(vicuna, rows):
    rows[0]["images"] = [{"bytes": None, "path": "/nowhere/a.png"}]
    with pytest.raises(RowError, match=r"a\[0\]: the image file /nowhere/a.png does not exist"):
        PromptCollator(vicuna)(rows)


@pytest.mark.parametrize("family", ["tiny_llava_dir", "tiny_llava_next_dir", "tiny_llava_onevision_dir"])
def test_each_family_runs_on_mixed_batches(family, request, rows, red_image, blue_image):
    """A forward pass that does not raise proves the number of image tokens: one, none and two pictures a row."""
    from transformers import AutoProcessor

    folder = request.getfixturevalue(family)
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = VICUNA_V1_CHAT_TEMPLATE
    model = AutoModelForImageTextToText.from_pretrained(folder)
    wide = Image.new("RGB", (120, 30), "green")
    pair = {**rows[0], "row_name": "a[2]", "images": [blue_image, wide]}
    pair["prompt"] = [user(PICTURE, PICTURE, text("Which is it?"))]
    single = {**rows[0], "row_name": "a[3]", "images": [wide]}
    batch = SFTCollator(processor)([rows[0], rows[1], pair, single])
    assert len(batch["pixel_values"]) == 4
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)
