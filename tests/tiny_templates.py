"""Chat templates in the form of those on the Hub, one for each family of `tiny_families` that has one there."""

_BLOCKS = (
    "{%- macro said(message, image) -%}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for block in message.content -%}"
    "{%- if block.type == 'image' -%}{{ image }}{%- elif block.type == 'text' -%}{{ block.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)


def chatml(image: str, *, system: str | None = None) -> str:
    """Qwen-VL and InternVL: each turn between `<|im_start|>role` and `<|im_end|>`.

    Args:
        image: what stands for an image.
        system: what a conversation without a system turn begins with.
    """
    default = (
        "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\n" + system + "<|im_end|>\\n' }}{%- endif -%}"
        if system
        else ""
    )
    return (
        _BLOCKS + default + "{%- for message in messages -%}"
        "{{ '<|im_start|>' + message.role + '\\n' + said(message, '" + image + "') + '<|im_end|>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


def utterances(start: str) -> str:
    """SmolVLM and Idefics3: `User: ...<end_of_utterance>`; no space before an image.

    Args:
        start: the token that a conversation begins with.
    """
    return (
        _BLOCKS + "{{ '" + start + "' }}{%- for message in messages -%}"
        "{%- set text = said(message, '<image>') -%}"
        "{{ message.role.capitalize() + (':' if text.startswith('<image>') else ': ') + text }}"
        "{{ '<end_of_utterance>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
    )


# Roles take turns; what a system says stands in front of the first user's words; texts are stripped.
GEMMA = (
    _BLOCKS + "{{ bos_token }}"
    "{%- set turns = namespace(first='', user=true) -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}"
    "{%- set turns.first = said(message, '<start_of_image>') + '\\n\\n' -%}"
    "{%- else -%}"
    "{%- if (message.role == 'user') != turns.user -%}"
    "{{ raise_exception('user and assistant must take turns') }}"
    "{%- endif -%}"
    "{%- set turns.user = not turns.user -%}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + turns.first }}"
    "{{ said(message, '<start_of_image>') | trim }}{{ '<end_of_turn>\\n' }}"
    "{%- set turns.first = '' -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)

# Roles take turns; what a system says stands in front of the last user's words.
PIXTRAL = (
    _BLOCKS + "{{ bos_token }}"
    "{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}"
    "{%- for message in turns -%}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('user and assistant must take turns') }}"
    "{%- endif -%}"
    "{%- if message.role == 'user' -%}"
    "{{ '[INST]' }}"
    "{%- if loop.revindex <= 2 and messages[0].role == 'system' and "
    "(loop.last or turns[loop.index].role == 'assistant' and loop.revindex == 2) -%}"
    "{{ said(messages[0], '[IMG]') + '\\n\\n' }}"
    "{%- endif -%}"
    "{{ said(message, '[IMG]') + '[/INST]' }}"
    "{%- else -%}{{ said(message, '[IMG]') + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
