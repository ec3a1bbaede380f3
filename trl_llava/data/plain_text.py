"""Special tokens written by a user stay text.

`</s>` in a completion or `<image>` in a caption must not become the token of that name. Before a conversation is
rendered, each such string is replaced by a private character (`guard`), so that every special string of the rendered
text is the template's own; after tokenisation the private characters' tokens are replaced by the string's ids as text
(`splice`). Rows without such strings go through unchanged.
"""

import re
from collections.abc import Sequence
from itertools import count

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data.contract import RowError
from trl_llava.prompts import Message

Span = tuple[int, int]


def special_strings(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[str]:
    """List the strings that the tokenizer or the processor treats as something other than text, longest first."""
    tokenizer = getattr(processor, "tokenizer", processor)
    strings = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    strings.update(tokenizer.all_special_tokens)
    strings.update(getattr(processor, "all_special_multimodal_tokens", []))
    return sorted(filter(None, strings), key=len, reverse=True)


def guard(messages: Sequence[Message], specials: list[str], row_name: str) -> tuple[list[Message], dict[str, str]]:
    """Put a private character in the place of every special string (`specials`, longest first) in the messages.

    Returns also the special string that each private character stands for. A special string that runs over two parts
    of one message, where no character can stand for it, is a `RowError`.
    """
    texts = [[part["text"] for part in _parts(message) if part["type"] == "text"] for message in messages]
    present = [special for special in specials if any(special in text for parts in texts for text in parts)]
    for parts in texts:
        split = [s for s in specials if "".join(parts).count(s) > sum(text.count(s) for text in parts)]
        if split:
            raise RowError(
                row_name, f"the special token {split[0]!r} runs over two text parts of a message", "Join the parts"
            )
    if not present:
        return list(messages), {}
    used = set("".join(text for parts in texts for text in parts))
    free = (character for character in map(chr, count(0xF0000)) if character not in used)
    stand_in = dict(zip(present, free, strict=False))
    pattern = re.compile("|".join(map(re.escape, present)))

    def replaced(part: dict[str, str]) -> dict[str, str]:
        if part["type"] != "text":
            return part
        return {**part, "text": pattern.sub(lambda match: stand_in[match.group()], part["text"])}

    guarded = [{**message, "content": [replaced(part) for part in _parts(message)]} for message in messages]
    return guarded, {character: special for special, character in stand_in.items()}


def splice(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: list[int],
    offsets: Sequence[Span],
    stand_ins: dict[str, str],
    specials: list[str],
) -> tuple[list[int], list[Span]]:
    """Replace the tokens of private characters in the rendered `text` by the ids of the special strings as text.

    `offsets` are the characters of each id, `stand_ins` what each private character stands for; returned are the
    new ids and their characters in `text`.
    """
    forbidden = set(tokenizer.convert_tokens_to_ids(specials))
    private = re.compile("[" + "".join(stand_ins) + "]+")
    new_ids: list[int] = []
    new_offsets: list[Span] = []
    position = 0
    for match in private.finditer(text):
        first, last = match.span()
        while position < len(ids) and offsets[position][1] <= first:
            new_ids.append(ids[position])
            new_offsets.append(offsets[position])
            position += 1
        # The token may hold neighbours of the private characters, and a tokenizer may leave out the space before it:
        # everything from the last kept token to the end of the last overlapping one is tokenised again, as text.
        start = max((end for _, end in new_offsets), default=0)
        while position < len(ids) and offsets[position][0] < last:
            last = max(last, offsets[position][1])
            position += 1
        plain = "".join(stand_ins.get(character, character) for character in text[start:last])
        plain_ids = _as_text(tokenizer, plain, forbidden)
        new_ids += plain_ids
        new_offsets += [(start, last)] * len(plain_ids)
    return new_ids + ids[position:], new_offsets + list(offsets[position:])


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str, forbidden: set[int]) -> list[int]:
    """Tokenise a piece of text from within a line: no special tokens, and no word-start mark of its own."""
    anchored = tokenizer(
        "\n" + text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    pairs = list(zip(anchored["input_ids"], anchored["offset_mapping"], strict=True))
    ids = [token for token, (_, end) in pairs if end > 1]
    if not ids or any(start == 0 and end > 1 for _, (start, end) in pairs):  # a token holds the anchor and the text
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if forbidden & set(ids) - {tokenizer.unk_token_id}:
        # Added as a token but not as a special one (`split_special_tokens` passes it by): take it apart.
        return _as_text(tokenizer, text[:1], forbidden) + _as_text(tokenizer, text[1:], forbidden)
    return ids


def _parts(message: Message) -> list[dict[str, str]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
