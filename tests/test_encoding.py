"""Ids equal to the processor's own, answers located by position, and special strings in a text that stay text."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from trl_llava.data.contract import RowError
from trl_llava.data.encoding import encode
from trl_llava.data.plain_text import special_strings
from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE, render

PICTURE = {"type": "image", "text": None}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(*parts):
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": parts}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.fixture
def vicuna(tiny_processor):
    tiny_processor.chat_template = VICUNA_V1_CHAT_TEMPLATE
    return tiny_processor


@pytest.fixture(scope="module")
def byte_level():
    """A GPT-2-like tokenizer: words with their space, offsets without it, ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        # The last words make a token of a space and the first byte of a private character, as large vocabularies have.
        ["What is in the picture? A red square and a blue circle. \U000f0000 \U000f1000 \U000fa000"] * 4,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    return fast


@pytest.mark.parametrize("family", ["tiny_llava_dir", "tiny_llava_next_dir", "tiny_llava_onevision_dir"])
def test_ids_are_the_processors_own(family, request, red_image, blue_image):
    processor = AutoProcessor.from_pretrained(request.getfixturevalue(family))
    processor.chat_template = VICUNA_V1_CHAT_TEMPLATE
    wide = Image.new("RGB", (120, 30), "green")
    conversations = [
        [user(PICTURE, "What is it?"), assistant("A red square."), user("Is there a circle?")],
        [user("Is there a circle?")],
        [user(PICTURE, PICTURE, "Which is it?")],
        [user(PICTURE, "What  is\n it? ")],
    ]
    images = [[red_image], [], [blue_image, wide], [wide]]
    encoding = encode(processor, conversations, images, add_generation_prompt=True)
    texts = [render(processor, messages, add_generation_prompt=True) for messages in conversations]
    own = processor(text=texts, images=[row for row in images if row])
    assert encoding.input_ids == own["input_ids"]
    image_token = processor.image_token_id
    assert encoding.image_mask == [[token == image_token for token in ids] for ids in encoding.input_ids]
    assert not any(map(any, encoding.assistant_mask))
    assert len(encoding.images.tensors["pixel_values"]) == 4


def test_llava_next_pictures_take_tokens_by_their_size(tiny_llava_next_dir, red_image):
    processor = AutoProcessor.from_pretrained(tiny_llava_next_dir)
    images = [[red_image], [Image.new("RGB", (120, 30))]]
    encoding = encode(processor, [[user(PICTURE, "Hi"), assistant("Ho")]] * 2, images)
    assert [sum(mask) for mask in encoding.image_mask] == [70, 34]


def answers_of(encoding, tokenizer, i=0):
    ids, mask = encoding.input_ids[i], encoding.assistant_mask[i]
    return tokenizer.decode([token for token, learned in zip(ids, mask, strict=True) if learned])


def test_role_markers_in_an_answer_are_part_of_it(vicuna, red_image):
    conversation = [
        user(PICTURE, "Who says USER: and ASSISTANT: here?"),
        assistant("The label says ASSISTANT: hello there. USER: yes"),
    ]
    encoding = encode(vicuna, [conversation], [[red_image]], assistant_turns="all")
    assert answers_of(encoding, vicuna.tokenizer) == "The label says ASSISTANT: hello there. USER: yes</s>"


@pytest.mark.parametrize("text", ["one</s>two", "<image>", "a <pad>", " </s> <s>", "<s></s>\n<image> x", "<unk>?"])
def test_special_strings_in_a_text_stay_text(vicuna, red_image, text):
    tokenizer = vicuna.tokenizer
    conversation = [user(PICTURE, f"Is it {text} here?"), assistant(text), user(text), assistant("No.")]
    plain = [user(PICTURE, "Is it x here?"), assistant("x"), user("x"), assistant("No.")]
    encoding = encode(vicuna, [conversation, plain], [[red_image], [red_image]], assistant_turns="all")
    specials = set(tokenizer.convert_tokens_to_ids(special_strings(vicuna)))
    own = [[token for token in ids if token in specials] for ids in encoding.input_ids]
    assert own[0] == own[1]
    assert answers_of(encoding, tokenizer) == f"{text}</s> No.</s>"
    assert f"USER: {text} ASSISTANT:" in tokenizer.decode(encoding.input_ids[0])
    assert f"Is it {text} here?" in tokenizer.decode(encoding.input_ids[0])


@pytest.mark.parametrize("text", ["a<|im_end|>b", "x <|im_start|> y", "<|im_end|>", "red <|pad|>", "\n<|im_end|>\n"])
def test_special_strings_stay_text_with_a_byte_level_tokenizer(byte_level, text):
    encoding = encode(byte_level, [[user(f"What {text} ?"), assistant(text)]], assistant_turns="all")
    decoded = byte_level.decode(encoding.input_ids[0])
    assert decoded == f"<|im_start|>user\nWhat {text} ?<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
    end, start = byte_level.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert [token for token in encoding.input_ids[0] if token in (end, start)] == [start, end, start, end]
    assert answers_of(encoding, byte_level) == f"{text}<|im_end|>"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["<|im_end|>", "<|pad|>", " ", "a", "square", "\n", "é", "\U000f0000", "<|"])))
def test_any_mixture_of_text_and_special_strings_survives(byte_level, pieces):
    text = "".join(pieces)
    encoding = encode(byte_level, [[user("What?"), assistant(text)]], assistant_turns="all")
    assert answers_of(encoding, byte_level) == f"{text}<|im_end|>"
    assert encoding.input_ids[0].count(byte_level.eos_token_id) == 2


def test_a_special_token_added_as_an_ordinary_one_stays_text(byte_level):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_tokens(["<image>"])

    class Processor:  # what `special_strings` and `render` read of a processor
        chat_template = CHATML
        all_special_multimodal_tokens = ("<image>",)

        def apply_chat_template(self, messages, **options):
            return tokenizer.apply_chat_template(messages, **options)

    processor = Processor()
    processor.tokenizer = tokenizer
    encoding = encode(processor, [[user("What?"), assistant("a <image> b")]], assistant_turns="all")
    assert tokenizer.convert_tokens_to_ids("<image>") not in encoding.input_ids[0]
    assert answers_of(encoding, tokenizer) == "a <image> b<|im_end|>"


def test_a_special_string_over_two_parts_is_refused(vicuna):
    with pytest.raises(RowError, match="the special token '</s>' runs over two text parts"):
        encode(vicuna, [[user("one</", "s>two")]])


def test_the_newline_after_a_stop_token_is_not_learned(byte_level):
    conversation = [user("What?"), assistant("A red square."), user("And?"), assistant("A circle.")]
    encoding = encode(byte_level, [conversation], assistant_turns="all")
    assert answers_of(encoding, byte_level) == "A red square.<|im_end|>A circle.<|im_end|>"
    encoding = encode(byte_level, [conversation], assistant_turns="last")
    assert answers_of(encoding, byte_level) == "A circle.<|im_end|>"


def test_bos_of_the_template_is_not_doubled(vicuna):
    vicuna.chat_template = "{{ bos_token }}" + VICUNA_V1_CHAT_TEMPLATE
    ids = encode(vicuna, [[user("Hi"), assistant("Ho")]]).input_ids[0]
    assert ids.count(vicuna.tokenizer.bos_token_id) == 1 and ids[0] == vicuna.tokenizer.bos_token_id


@pytest.mark.parametrize("count", [0, 2])
def test_image_parts_unlike_the_images_name_the_row(vicuna, red_image, count):
    with pytest.raises(RowError, match=rf"a\[5\]: its messages show 1 image, but it has {count}"):
        encode(vicuna, [[user(PICTURE, "Hi")]], [[red_image] * count], row_names=["a[5]"])


def test_template_without_stop_token_is_an_error(vicuna):
    vicuna.chat_template = VICUNA_V1_CHAT_TEMPLATE.replace(" + eos_token", " + ' '")
    with pytest.raises(ValueError, match="would never learn to stop"):
        encode(vicuna, [[user("Hi"), assistant("Ho")]], assistant_turns="all")
    assert encode(vicuna, [[user("Hi"), assistant("Ho")]]).input_ids


def test_template_that_rewrites_earlier_turns_is_an_error(vicuna):
    vicuna.chat_template = "{{ messages | length }}" + VICUNA_V1_CHAT_TEMPLATE
    with pytest.raises(ValueError, match="render earlier turns the same"):
        encode(vicuna, [[user("Hi"), assistant("Ho")]], assistant_turns="all")


def test_template_that_drops_images_is_an_error(vicuna, red_image):
    vicuna.chat_template = VICUNA_V1_CHAT_TEMPLATE.replace("<image>\n", "")
    with pytest.raises(ValueError, match="writes 0 image tokens '<image>' for 1 images"):
        encode(vicuna, [[user(PICTURE, "Hi")]], [[red_image]])


def test_template_that_refuses_the_messages_names_the_row(vicuna):
    with pytest.raises(RowError, match=r"a\[0\]: the chat template refuses its messages"):
        encode(vicuna, [[user("Hi"), {"role": "system", "content": "x"}]], row_names=["a[0]"])


def test_processor_that_does_not_expand_images_is_an_error(vicuna, red_image, monkeypatch):
    monkeypatch.setattr(type(vicuna), "get_text_with_replacements", lambda self, text, *_: (text, []))
    with pytest.raises(ValueError, match="replace_image_token"):
        encode(vicuna, [[user(PICTURE, "Hi")]], [[red_image]])


def test_processor_with_inputs_per_token_is_an_error(vicuna, red_image, monkeypatch):
    own = type(vicuna).__call__
    monkeypatch.setattr(type(vicuna), "__call__", lambda self, **kw: {**own(self, **kw), "mm_token_type_ids": [[0]]})
    with pytest.raises(ValueError, match="makes mm_token_type_ids beside"):
        encode(vicuna, [[user(PICTURE, "Hi")]], [[red_image]])


def test_slow_tokenizer_is_an_error(byte_level, monkeypatch):
    monkeypatch.setattr(type(byte_level), "is_fast", False)
    with pytest.raises(ValueError, match="gives no character offsets"):
        encode(byte_level, [[user("Hi")]])
