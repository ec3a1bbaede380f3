"""The demo's word-level tokenizer, in which each object is one token, and its chat template."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_llava.demo.world import COLOURS, OBJECTS, SHAPES

# Roles as in vicuna_v1, without the system prompt: 26 words less in each of the thousands of rollouts.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{ ' ' if not loop.first }}ASSISTANT: {% else %}USER: {% endif -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<image>\\n' }}{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if message.role == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
)
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
# A word that may follow a space is in the vocabulary with that space, so that decoding is joining.
_SPACED = (
    *(f"a {name}" for name in OBJECTS),
    *COLOURS,
    *SHAPES,
    *("I", "see", "and", "Describe", "the", "picture", "Is", "there", "Which", "is", "Yes", "No", "none"),
    *("A", "B", "C", "D", "It", "shows", "True", "answer", "score", "a", "ASSISTANT:"),
)
_UNSPACED = ("USER: ", "USER:", "ASSISTANT:", ".", ",", "?", ":", "-", "\n", " ")


# An object is one word to the model, with its article.
_OBJECT = f"a (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"


def make_tokenizer(spaced: Sequence[str] = _SPACED, phrase: str = _OBJECT) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer, with its chat template; nothing is learned, so it is always the same.

    `spaced` are its words, `phrase` the pattern of those that are several words, or of one word where there are none.
    """
    words = [*_SPECIAL, *_UNSPACED, *(f" {word}" for word in spaced)]
    words += [word for word in spaced if word not in words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    pattern = rf"USER: ?| ?ASSISTANT:| ?{phrase}(?![a-z])| ?[A-Za-z]+| ?[0-9]+|\n|[^\sA-Za-z0-9]| "
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
