"""The weights of a whole model, put back from a checkpoint."""

from pathlib import Path

from transformers import PreTrainedModel


def load_full_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Put saved weights in place.

    A checkpoint has the names of the Hub, which only `from_pretrained` translates: transformers' trainer reads the
    file as it is, finds no name of a LLaVA, and goes on from the base.

    Args:
        model: The model, on any device.
        folder: A checkpoint.
    """
    saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
