"""A LLaVA checkpoint's sentencepiece `tokenizer.model` as the fast tokenizer that gives the paper's ids.

LLaVA splits a prompt at `<image>`, tokenises each part as a text of its own and keeps one BOS: a part after an image
begins with a word-start mark: `:` `▁` `<image>` `▁` `\\n`. What follows another special token depends on the `legacy`
flag of the checkpoint's tokenizer_config.json: `</s>USER` is `</s>` `▁US` `ER` with it and `</s>` `US` `ER` without.
transformers' own conversion of the same file differs in three points: it adds no mark to a part that begins with a
space, none after `<image>` without `legacy`, and it merges by position in the vocabulary instead of by score, which
runs of spaces show. Here all three are as in the original.

Two things a fast tokenizer cannot do, neither of which vicuna_v1 prompts contain, and without `legacy` only: a newline
straight after `</s>` gets a mark, and a word straight after `</s>` whose piece exists with the mark only is spelled in
smaller pieces, where the original gives `<unk>`. `check_ids` compares with sentencepiece on the texts that prompts are
made of, and refuses a vocabulary that it reads differently. One thing is noted instead: if `USER` itself is such a
word (`reads_later_turns_as_unknown`; not in LLaMA's vocabulary), later turns are spelled where the original lost them.

`<image>` takes the place of the byte piece `<0xFF>`, which no UTF-8 text contains. The vocabulary keeps its size, so
the logits and log-probabilities of a converted model are those of the original, over the same tokens.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trl_llava.errors import InputError, MissingPackageError
from trl_llava.prompts import JUDGING_ANSWER_PREFIX, VICUNA_V1_SYSTEM, JudgingPrompt

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

IMAGE_TOKEN = "<image>"
MARK = "▁"
_UNUSED_BYTE = "<0xFF>"


def load_sentencepiece(file: str | Path) -> "SentencePieceProcessor":
    """Open a `tokenizer.model`."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise MissingPackageError(
            "reading a tokenizer.model needs sentencepiece, which is not installed: `pip install trl-llava[convert]`"
        ) from error
    try:
        return SentencePieceProcessor(str(file))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{file} is not a sentencepiece model ({error})") from error


def load_paper_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint's folder, which holds `tokenizer.model` and tokenizer_config.json."""
    folder = Path(folder)
    if not (folder / "tokenizer.model").is_file():
        raise InputError(f"{folder} has no tokenizer.model, which defines the ids its model was trained with")

    return paper_tokenizer(
        folder / "tokenizer.model",
        legacy=is_legacy(folder),
        added_tokens=_read(folder / "added_tokens.json"),
        max_length=_read(folder / "tokenizer_config.json").get("model_max_length"),
    )


def is_legacy(folder: Path) -> bool:
    """The flag of a checkpoint's tokenizer; transformers took a missing one for true."""
    return bool(_read(folder / "tokenizer_config.json").get("legacy", True))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def paper_tokenizer(
    file: str | Path, *, legacy: bool = True, added_tokens: dict[str, int] | None = None, max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a `tokenizer.model`, with `<image>`, and `<unk>` as pad token as in the paper.

    `added_tokens` are those that the checkpoint has beside the model's pieces (its added_tokens.json).
    """
    source = load_sentencepiece(file)
    pieces = {source.id_to_piece(i): i for i in range(source.get_piece_size())}
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2}
    if {piece: pieces.get(piece) for piece in expected} != expected or not source.is_byte(pieces.get(_UNUSED_BYTE, 0)):
        raise InputError(
            f"{file} is not a LLaMA tokenizer: expected the pieces {expected} and bytes up to {_UNUSED_BYTE}. Only "
            "LLaVA checkpoints over LLaMA and Vicuna can be converted"
        )
    merges = _merges(source, pieces)
    vocabulary = {IMAGE_TOKEN if piece == _UNUSED_BYTE else piece: i for piece, i in pieces.items()}
    backend = _backend(vocabulary, merges, legacy)
    special = [*expected, IMAGE_TOKEN, *sorted(added_tokens or {}, key=(added_tokens or {}).__getitem__)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    wrong = {t: i for t, i in (added_tokens or {}).items() if backend.token_to_id(t) != i}
    if wrong:
        raise InputError(f"added_tokens.json gives {wrong}, ids that do not follow the {len(pieces)} of {file}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **({} if max_length is None else {"model_max_length": max_length}),
    )
    check_ids(tokenizer, source, legacy)
    return tokenizer


def _backend(vocabulary: dict[str, int], merges: list[tuple[str, str]], legacy: bool) -> Tokenizer:
    """The fast tokenizer that splits and marks as sentencepiece with this `legacy` flag did."""
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", MARK)
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), spaces])
    else:
        # Every part that begins with a space or a newline gets a mark here, and the first part in any case.
        also = [normalizers.Replace(Regex(rf"\A{first}"), MARK + first) for first in (MARK, "\n")]
        backend.normalizer = normalizers.Sequence([spaces, *also])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def original_ids(source: "SentencePieceProcessor", text: str, legacy: bool) -> list[int]:
    """Ids of a prompt as the original computes them: LLaVA's splitting, and the slow LLaMA tokenizer in each part.

    An image, `<image>` in the prompt, is -200 as there.
    """
    ids = [source.bos_id()]
    for number, part in enumerate(text.split(IMAGE_TOKEN)):
        ids += [-200] if number else []
        chunks = [chunk for chunk in re.split(r"(<s>|</s>|<unk>)", part) if chunk]
        for place, chunk in enumerate(chunks):
            if chunk in ("<s>", "</s>", "<unk>"):
                ids.append(source.piece_to_id(chunk))
                continue
            pieces = source.encode(chunk, out_type=str)
            if not legacy and place and not chunk.startswith((" ", MARK)) and pieces[0].startswith(MARK):
                pieces = ([pieces[0][1:]] if len(pieces[0]) > 1 else []) + pieces[1:]
            ids += [source.piece_to_id(piece) for piece in pieces]
    return ids


def check_ids(tokenizer: PreTrainedTokenizerFast, source: "SentencePieceProcessor", legacy: bool) -> None:
    """Compare a fast tokenizer with sentencepiece on what prompts are made of; other ids are an error."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for text in _PROBES:
        if "</s>USER" in text and reads_later_turns_as_unknown(source, legacy):
            continue
        wanted = original_ids(source, text, legacy)
        found = [-200 if token == image else token for token in tokenizer(text)["input_ids"]]
        if found != wanted:
            at = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), -1)
            raise InputError(
                f"the fast tokenizer reads {text!r} otherwise than the checkpoint's own from token {at} on: found "
                f"{found[at:][:8]}, expected {wanted[at:][:8]}. A model would be given other prompts than it was "
                "trained with, so this tokenizer.model cannot be converted"
            )


def reads_later_turns_as_unknown(source: "SentencePieceProcessor", legacy: bool) -> bool:
    """Whether the original gives `<unk>` for the `USER` of every turn but the first, which the fast tokenizer spells.

    Without `legacy` it takes the word-start mark off the first piece behind `</s>`, and looks up what is left. LLaMA's
    own vocabulary has it.
    """
    first = source.encode("USER:", out_type=str)[0].removeprefix(MARK)
    return not legacy and bool(first) and source.piece_to_id(first) == source.unk_id()


def _merges(source: "SentencePieceProcessor", pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of every piece into two, best score first, which is the order that sentencepiece merges in."""
    merges = []
    for piece, i in pieces.items():
        if source.is_control(i) or source.is_unknown(i) or source.is_byte(i):
            continue
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in pieces and right in pieces:
                merges.append((-source.get_score(i), pieces[left], pieces[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


_QUESTION = f"{VICUNA_V1_SYSTEM} USER: {IMAGE_TOKEN}\nIs it  25.5 °C?\n\tYes or no — déjà vu? 猫 🐈 ASSISTANT:"
_PROBES = (
    _QUESTION,
    f"{_QUESTION} No,  it is not.\n</s>USER: And a ▁cat? ASSISTANT:  Yes.</s>",
    f"{VICUNA_V1_SYSTEM} USER: {IMAGE_TOKEN} ASSISTANT: A.</s> USER: "
    + JudgingPrompt().text(["A cat.", " Two  spaces\n"])
    + f" ASSISTANT: {JUDGING_ANSWER_PREFIX}",
    f"{VICUNA_V1_SYSTEM} USER: {IMAGE_TOKEN}\n{IMAGE_TOKEN}\nWhich? ASSISTANT:",
)
