"""What processors of some families do to texts and tensors that nobody who renders prompts by a template expects."""

from typing import Any

from transformers import PaliGemmaProcessor as _PaliGemmaProcessor
from transformers import ProcessorMixin


class PaliGemmaProcessor(_PaliGemmaProcessor):
    """PaliGemma's processor on rendered prompts, which hold BOS and the new line already: it puts in no second ones.

    It makes no labels either: those of its own are of the prompt, and TRL's trainers would hand them to the model. It
    has its parent's name, under which it is saved.
    """

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Images as the parent lays them out; texts as they are."""
        texts = [text] if isinstance(text, str) else text
        rendered = texts is not None and all(self.tokenizer.bos_token in one for one in texts)
        images, laid_out, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        return images, list(texts) if rendered else laid_out, *others

    def __call__(self, images: Any = None, text: Any = None, suffix: Any = None, **kwargs: Any) -> Any:
        """As the parent, but `labels` only with a `suffix`; its own need prompts of one length, even unpadded."""
        if suffix is not None:
            return super().__call__(images=images, text=text, suffix=suffix, **kwargs)
        settings = self._merge_kwargs(
            tokenizer_init_kwargs=self.tokenizer.init_kwargs, **{**kwargs, "return_token_type_ids": True}
        )
        return ProcessorMixin.__call__(self, images=images, text=text, **settings)


def without_quirks(processor: ProcessorMixin) -> ProcessorMixin:
    """The same processor, in place, which treats rendered prompts of any length alike."""
    if type(processor) is _PaliGemmaProcessor:
        processor.__class__ = PaliGemmaProcessor
    defaults = getattr(processor, "text_kwargs", None)
    if isinstance(defaults, dict) and "return_tensors" in defaults:  # Pixtral's: prompts of one length only
        processor.text_kwargs = {name: value for name, value in defaults.items() if name != "return_tensors"}
    return processor
