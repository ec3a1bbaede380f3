"""Every prompt string, and how messages become text.

The strings of this file are a protocol: a reward model that was trained with them scores right only when it reads
exactly them. They are the ones of "Aligning Large Multimodal Models with Factually Augmented RLHF" (arXiv 2309.14525),
in the conversation format that LLaVA calls `vicuna_v1`.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.errors import InputError

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": [{"type": "text", "text": str} | {"type": "image"}]}`."""

VICUNA_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Images come first in their turn, one per line; a turn without text ends with the image. `judging_turn` puts the space
# in front of the last user turn that only the judging turn has (LLaVA joins later turns to `</s>` without one).
VICUNA_V1_CHAT_TEMPLATE = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- macro images(content) -%}"
    "{%- if content is not string -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = text(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    '{%- set system = "' + VICUNA_V1_SYSTEM + '" -%}{%- set turns = messages -%}'
    "{%- endif -%}"
    "{{- system -}}"
    "{%- for turn in turns -%}"
    "{%- if turn['role'] == 'user' -%}"
    "{{- ' ' if loop.first or (judging_turn and turns[loop.index:] | selectattr('role', 'equalto', 'user') | list"
    " | length == 0) -}}"
    "{%- set question = text(turn['content']) -%}{%- set pictures = images(turn['content']) -%}"
    "{{- 'USER: ' + (pictures + question if question else pictures[:-1]) -}}"
    "{%- elif turn['role'] == 'assistant' -%}"
    "{{- ' ASSISTANT: ' + text(turn['content']) + eos_token -}}"
    "{%- else -%}"
    "{{- raise_exception('vicuna_v1 has no place for the role ' + turn['role'] + ' after the first message') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- ' ASSISTANT:' if add_generation_prompt -}}"
)

# PaliGemma's prompts: images, BOS, the question and a new line; the completion follows. Checkpoints bring no template.
PALIGEMMA_CHAT_TEMPLATE = (
    "{%- for turn in messages -%}"
    "{%- set content = turn['content'] -%}"
    "{%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- if loop.first -%}{{ bos_token }}{%- endif -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{{ eos_token if turn['role'] == 'assistant' else '\n' }}"
    "{%- endfor -%}"
)

FACTUAL_PLACEHOLDER = "{factual_prompt}"
CAPTION_PLACEHOLDER = "{caption}"

JUDGING_INSTRUCTION = (
    "Please evaluate the quality of your last response. There are several dimensions you should consider in your "
    "evaluation:\n\n"
    "1. Accurate: The AI should provide factual and accurate information from the image, and refrain from making "
    "statements that are not supported by the image or inconsistent with the image. {factual_prompt}\n"
    "2. Helpful: The AI’s response should precisely serve the user's needs and interests, while grounding the "  # noqa: RUF001
    "response in the image.\n"
    "3. Language Natural: The AI should employ language that flows smoothly and is free from repetitive or awkward "
    "constructs.\n"
    "4. Concise: The AI should efficiently address the task or answer the question, communicating the necessary "
    "information with brevity and clarity.\n\n"
    "A good response should be accurate, helpful, language natural, and concise."
)
JUDGING_ANSWER_PREFIX = "Following your definitions, the quality score of my last response is"
FACTUAL_HEADER = (
    "Specifically, the AI's response should be fully supported by the combination of the following captions:\n"
)
CAPTION_LINE = "  - {caption}\n"


@dataclass(frozen=True)
class JudgingPrompt:
    """What a reward model reads after the completion that it judges; it travels with the model's checkpoint.

    Args:
        instruction: Text of the judging turn. `{factual_prompt}` marks the place of the captions; without captions the
            mark goes, together with the space before it.
        answer_prefix: How the assistant's judgement begins; the score is read at its last token.
        factual_header: What stands before the captions.
        caption_line: One caption; `{caption}` marks its place.
        with_captions: Whether the judge reads captions.
        seed: Seed of the order of the captions.
    """

    instruction: str = JUDGING_INSTRUCTION
    answer_prefix: str = JUDGING_ANSWER_PREFIX
    factual_header: str = FACTUAL_HEADER
    caption_line: str = CAPTION_LINE
    with_captions: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.answer_prefix.strip():
            raise InputError("JudgingPrompt.answer_prefix is empty, but the score is read at its last token.")
        if self.with_captions and FACTUAL_PLACEHOLDER not in self.instruction:
            raise InputError(
                f"JudgingPrompt.instruction has no {FACTUAL_PLACEHOLDER} to mark where the captions go. Add it, or "
                "set with_captions to false."
            )
        if self.with_captions and CAPTION_PLACEHOLDER not in self.caption_line:
            raise InputError(f"JudgingPrompt.caption_line has no {CAPTION_PLACEHOLDER}: found {self.caption_line!r}.")

    def text(self, captions: Sequence[str]) -> str:
        """Fills the instruction with captions, in the order given; an empty sequence gives the plain variant."""
        if not captions:
            plain = self.instruction.replace(f" {FACTUAL_PLACEHOLDER}", "")
            return plain.replace(FACTUAL_PLACEHOLDER, "")
        lines = [self.caption_line.replace(CAPTION_PLACEHOLDER, caption) for caption in captions]
        return self.instruction.replace(FACTUAL_PLACEHOLDER, self.factual_header + "".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "JudgingPrompt":
        """The prompt of `to_dict`; fields left out are the paper's, unknown ones an error: scores would be wrong."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise InputError(
                f"The judging prompt has unknown fields {unknown}; expected {[field.name for field in fields(cls)]}. "
                "It may come from a newer version of trl_llava: update, or remove the fields."
            )
        return cls(**values)


def judging_messages(
    conversation: Sequence[Message], captions: Sequence[str] | None, prompt: JudgingPrompt, *, key: str | None = None
) -> list[Message]:
    """Appends the judging turn and the beginning of the judgement to a conversation that ends with a completion.

    Render the result with `continue_final_message=True` and `judging_turn=True`.

    Args:
        conversation: Messages; the last one is the completion to judge.
        captions: What is known about the image. Their order does not matter: they are sorted, then shuffled by a
            generator of their own, so both completions of a pair are read under one order that repeats.
        prompt: The judging prompt.
        key: What seeds the order, beside `prompt.seed`; by default the user's turns and the captions.

    Returns:
        The conversation, a user message with the instruction, and an unfinished assistant message.

    Raises:
        ValueError: If the conversation does not end with a completion, or captions are wanted and there are none.

    Example:
        >>> completion = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
        >>> question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        >>> judged = judging_messages([question, completion], ["A cat sleeps."], JudgingPrompt())
        >>> [message["role"] for message in judged]
        ['user', 'assistant', 'user', 'assistant']
    """
    if not conversation or conversation[-1]["role"] != "assistant":
        raise InputError("The conversation to judge does not end with an assistant message: there is no completion.")
    ordered: list[str] = []
    if prompt.with_captions:
        if not captions:
            raise InputError(
                "The judging prompt needs captions and there are none. Give `captions`, or use a reward model trained "
                "with with_captions=False."
            )
        ordered = sorted(captions)
        if key is None:
            questions = [message_text(message) for message in conversation if message["role"] == "user"]
            key = "\n".join([*questions, *ordered])
        random.Random(f"{prompt.seed}\n{key}").shuffle(ordered)
    return [
        *conversation,
        {"role": "user", "content": [{"type": "text", "text": prompt.text(ordered)}]},
        {"role": "assistant", "content": [{"type": "text", "text": prompt.answer_prefix}]},
    ]


def message_text(message: Message) -> str:
    """The text of a message, its text parts joined."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def render(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    judging_turn: bool = False,
) -> str:
    """Turns messages into text with the processor's own chat template; each image is one image token.

    Args:
        processor: A processor, or the tokenizer of a text-only model (it gets each message's text as a string).
        messages: The conversation.
        add_generation_prompt: End with what opens an assistant turn.
        continue_final_message: Leave the last message open: end with its last character.
        judging_turn: The last user turn is a judging turn; only templates that know this variable
            (`VICUNA_V1_CHAT_TEMPLATE`) act on it.

    Returns:
        The text, image tokens not yet multiplied.

    Raises:
        ValueError: If there is no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"{type(processor).__name__} has no chat template. Set one: `processor.chat_template = "
            "trl_llava.prompts.VICUNA_V1_CHAT_TEMPLATE` for a model trained on vicuna_v1 conversations."
        )
    if isinstance(processor, PreTrainedTokenizerBase):
        plain = [{"role": message["role"], "content": message_text(message)} for message in messages]
    else:
        plain = [{"role": message["role"], "content": _parts(message["content"])} for message in messages]
    # transformers warns about variables that a template does not know.
    known = {"judging_turn": True} if judging_turn and "judging_turn" in processor.chat_template else {}
    return processor.apply_chat_template(
        plain,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **known,
    )


def _parts(content: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # A row out of Arrow has `text: None` in its image parts, which `continue_final_message` would take for a text.
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": part["type"], "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
        for part in content
    ]
