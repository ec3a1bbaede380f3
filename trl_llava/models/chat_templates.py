"""The chat template that a recipe names, in the place of the one that a processor was saved with."""

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, ProcessorMixin

from trl_llava.configs.shipped import find_shipped
from trl_llava.errors import InputError, NotFoundError
from trl_llava.hub.lookup import check_there
from trl_llava.hub.names import split_revision
from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE, render

VICUNA_V1 = "vicuna_v1"
"""What a recipe writes as `chat_template_path` for the template of `prompts.py`."""


def set_chat_template(processor: ProcessorMixin, source: str, *, trust_remote_code: bool = False) -> None:
    """Give a processor, and its tokenizer, another chat template, which is saved with them for later stages.

    `source` is `vicuna_v1`, a `.jinja` or `.j2` file, or Hub ID or folder of a model. Unlike with TRL's
    `chat_template_path`, only the model's template is taken, no tokens are added.
    """
    if source == VICUNA_V1:
        template = VICUNA_V1_CHAT_TEMPLATE
    elif source.endswith((".jinja", ".j2")):
        path = find_shipped(source)
        if not path.is_file():
            raise NotFoundError(f"`chat_template_path`: there is no file {source}.")
        template = path.read_text(encoding="utf-8")
    else:
        template = _template_of_model(source, trust_remote_code)
    processor.chat_template = template
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.chat_template = template


def end_at_turns(processor: ProcessorMixin) -> None:
    """Make the special token that ends an assistant turn the tokenizer's end-of-sequence token; saved with it.

    Gemma's and Idefics3's end with another one than their tokenizers say: completions would never be seen to stop.
    """
    question = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]}
    try:
        end = render(processor, [question, answer]).rpartition("Ho")[2].strip()
    except (TemplateError, InputError, ValueError):  # said with its cause when rows are rendered
        return
    tokenizer = processor.tokenizer
    if end != tokenizer.eos_token and end in {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        tokenizer.eos_token = end


def _template_of_model(name: str, trust_remote_code: bool) -> str:
    expected = f"expected `{VICUNA_V1}`, a .jinja file, or a model's Hub ID or folder"
    name, revision = split_revision("`chat_template_path`", name)
    try:
        check_there("chat_template_path", name, revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        template = tokenizer.chat_template
    except (OSError, ValueError) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise NotFoundError(f"`chat_template_path`: cannot load {name!r}; {expected}. The cause: {cause}") from error
    if not isinstance(template, str):
        raise InputError(f"`chat_template_path`: the model {name!r} has no chat template; {expected}.")
    return template
