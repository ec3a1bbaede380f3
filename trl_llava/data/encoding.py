"""Conversations to token ids, with the place of each assistant turn known.

The ids are those of `processor(text=rendered, images=images)`. What the processor's own call cannot give is added
here: which tokens are the assistant's (from positions in the rendered text, so that no marker inside a text can
confuse it), and special tokens inside a user's text that stay text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data.contract import RowError, count_images, names_or_numbers
from trl_llava.data.image_tensors import ImageTensors, expand_images
from trl_llava.data.plain_text import guard, special_strings, splice
from trl_llava.data.token_kinds import kinds_name, kinds_of
from trl_llava.errors import InputError
from trl_llava.models.families import family_of_processor
from trl_llava.prompts import Message, render

AssistantTurns = Literal["none", "last", "all"]
"""Which assistant turns an encoding marks: the last one is the completion."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoding:
    """Conversations as ids, not yet padded: one list for each conversation."""

    input_ids: list[list[int]]
    assistant_mask: list[list[bool]]  # True on the tokens of assistant turns and of the tokens that end them
    image_mask: list[list[bool]]  # True on image tokens
    images: ImageTensors
    # By name, what kind each token is, for models that take it (`token_type_ids`, `mm_token_type_ids`).
    token_kinds: dict[str, list[list[int]]]


class EncodedText(NamedTuple):
    """Conversations as ids, without the tensors of their images."""

    input_ids: list[list[int]]
    assistant_mask: list[list[bool]]
    image_mask: list[list[bool]]
    token_kinds: dict[str, list[list[int]]]


def encode(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    images: Sequence[Sequence[Image.Image]] | None = None,
    *,
    row_names: Sequence[str] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    judging_turn: bool = False,
    assistant_turns: AssistantTurns = "none",
    image_copies: int = 1,
) -> Encoding:
    """Render and tokenise conversations, and prepare their images.

    Args:
        processor: A processor, or the tokenizer of a text-only model.
        conversations: `image_copies` times B conversations; conversation `i` shows the images of row `i % B`.
        images: The decoded images of B rows, an empty list for a text-only row; `None` if no row has any.
        row_names: Names of the B rows, for errors.
        add_generation_prompt: End each conversation with what opens an assistant turn.
        continue_final_message: Leave each last message open.
        judging_turn: Tell the chat template that the last user turn is a judging turn.
        assistant_turns: Which assistant turns `assistant_mask` marks.
        image_copies: How many conversations share the images of one row; the image tensors hold them once.

    Returns:
        The encoding.

    Raises:
        RowError: If a conversation does not show as many images as its row has, or the chat template refuses it.
        ValueError: If the processor has a layout that cannot be expanded, or a chat template whose assistant turns
            cannot be located; the message says which part is missing.
    """
    rows = len(conversations) // image_copies
    shown = expand_images(processor, images if images is not None else [[]] * rows)
    text = encode_text(
        processor,
        conversations,
        shown.replacements * image_copies,
        names_or_numbers(row_names, rows) * image_copies,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        judging_turn=judging_turn,
        assistant_turns=assistant_turns,
    )
    return Encoding(text.input_ids, text.assistant_mask, text.image_mask, shown, text.token_kinds)


def encode_text(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    replacements: Sequence[Sequence[str]],
    row_names: Sequence[str],
    *,
    assistant_turns: AssistantTurns = "none",
    **rendering: bool,
) -> EncodedText:
    """Render and tokenise conversations of which each has its images' `replacements`, the texts for its image tokens.

    `rendering` are the flags of `prompts.render`.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets, which locate assistant turns and images. Use the "
            "fast tokenizer of this model (a folder with tokenizer.json)."
        )
    specials, kinds = special_strings(processor), kinds_name(processor)
    family = family_of_processor(processor)
    prefixes = family is not None and family.attends_to_whole_prompt
    texts, guards, assistant_spans, image_spans, prompt_ends = [], [], [], [], []
    for messages, row_replacements, name in zip(conversations, replacements, row_names, strict=True):
        _check_image_count(messages, len(row_replacements), name)
        guarded, stand_ins = guard(messages, specials, name)
        text, spans = _render(processor, guarded, assistant_turns, specials, name, rendering)
        if prefixes:
            spans = [_first_completion(processor, guarded, text), *spans]
        text, spans, images = _expand(text, spans, getattr(processor, "image_token", None), row_replacements, name)
        if prefixes:
            prompt_ends.append(spans.pop(0)[0])
        texts.append(text)
        guards.append(stand_ins)
        assistant_spans.append(spans)
        image_spans.append(images)

    # A template that writes BOS itself (PaliGemma's behind the image) must not get a second one from the tokenizer.
    writes_bos = bool(tokenizer.bos_token) and all(tokenizer.bos_token in text for text in texts)
    outputs = tokenizer(
        texts,
        add_special_tokens=not writes_bos,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids, assistant_mask, image_mask, behind = [], [], [], []
    for i, text in enumerate(texts):
        row_ids, offsets = outputs["input_ids"][i], outputs["offset_mapping"][i]
        if guards[i]:
            row_ids, offsets = splice(tokenizer, text, row_ids, offsets, guards[i], specials)
        ids.append(row_ids)
        assistant_mask.append(_overlapping(offsets, assistant_spans[i]))
        image_mask.append(_overlapping(offsets, image_spans[i]))
        if prefixes:
            behind.append([int(last > prompt_ends[i]) for _, last in offsets])
    token_kinds = {} if kinds is None else {kinds: behind if prefixes else kinds_of(processor, ids)}
    return EncodedText(ids, assistant_mask, image_mask, token_kinds)


def _first_completion(
    processor: ProcessorMixin | PreTrainedTokenizerBase, messages: Sequence[Message], text: str
) -> Span:
    """Where the first assistant turn of the rendered `text` begins, or where it ends if there is none; no width."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    at = len(text) if first is None else len(render(processor, messages[:first], add_generation_prompt=True))
    return at, at


def _check_image_count(messages: Sequence[Message], images: int, row_name: str) -> None:
    shown = count_images(messages)
    if shown != images:
        raise RowError(
            row_name,
            f"its messages show {shown} image{'s' * (shown != 1)}, but it has {images}",
            "Give one image part in the messages for each image of the row",
        )


def _render(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    messages: Sequence[Message],
    assistant_turns: AssistantTurns,
    specials: list[str],
    row_name: str,
    rendering: dict[str, bool],
) -> tuple[str, list[Span]]:
    """Render a conversation and locate its assistant turns, each with the special token that ends it."""
    try:
        text = render(processor, messages, **rendering)
        spans = []
        for i, message in enumerate(messages):
            wanted = assistant_turns == "all" or (assistant_turns == "last" and i == len(messages) - 1)
            if message["role"] != "assistant" or not wanted:
                continue
            before = render(processor, messages[:i], add_generation_prompt=True) if i else None
            through = render(processor, messages[: i + 1])
            spans.append(_assistant_span(text, before, through, specials, row_name))
    except TemplateError as error:
        raise RowError(
            row_name, f"the chat template refuses its messages ({error})", "Correct the messages or the template"
        ) from error
    return text, spans


def _assistant_span(text: str, before: str | None, through: str, specials: list[str], row_name: str) -> Span:
    if before is None or not (text.startswith(through) and through.startswith(before)):
        part = "start with a user turn" if before is None else "render earlier turns the same when later ones follow"
        raise InputError(
            f"{row_name}: the assistant turns cannot be located, because the chat template does not {part}. Expected "
            "the messages before one, with the generation prompt, to be the beginning of the whole conversation. "
            "Set another chat template: `chat_template_path` in a recipe (a .jinja file, or vicuna_v1)."
        )
    # What follows the stop token (a newline in some templates) is not generated, so it is not learned either.
    body = through.rstrip()
    if len(body) <= len(before) or not body.endswith(tuple(specials)):
        raise InputError(
            f"{row_name}: the chat template ends an assistant turn with {through[len(before) :][-20:]!r}, not with a "
            "special token: a model trained with it would never learn to stop. Set a chat template that writes one: "
            "`chat_template_path: vicuna_v1` in a recipe, trl_llava.prompts.VICUNA_V1_CHAT_TEMPLATE in Python."
        )
    return len(before), len(body)


def _expand(
    text: str, spans: list[Span], image_token: str | None, replacements: Sequence[str], row_name: str
) -> tuple[str, list[Span], list[Span]]:
    """Replace each image token by its expansion, and move the other spans along."""
    chunks = text.split(image_token) if image_token else [text]
    if len(chunks) - 1 != len(replacements):
        raise InputError(
            f"{row_name}: the chat template writes {len(chunks) - 1} image tokens {image_token!r} for "
            f"{len(replacements)} images. Use the chat template that belongs to this processor."
        )
    expanded, at, images, shifts = chunks[0], len(chunks[0]), [], [(0, 0)]
    for chunk, replacement in zip(chunks[1:], replacements, strict=True):
        at += len(image_token or "")
        images.append((len(expanded), len(expanded) + len(replacement)))
        expanded += replacement + chunk
        shifts.append((at, images[-1][1] - at))
        at += len(chunk)

    def move(position: int) -> int:
        return position + next(shift for start, shift in reversed(shifts) if position >= start)

    return expanded, [(move(start), move(end)) for start, end in spans], images


def _overlapping(offsets: Sequence[Span], spans: list[Span]) -> list[bool]:
    """Mark the tokens that share a character with a span; tokens without characters (BOS) are in none."""
    if not spans:
        return [False] * len(offsets)
    return [any(start < end and first < end and start < last for start, end in spans) for first, last in offsets]
