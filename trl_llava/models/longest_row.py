"""How many positions a model has for text: no row may be longer, whatever a recipe allows."""

from typing import Any

from transformers import AutoConfig

from trl_llava.hub.names import split_revision


def positions_of(model: Any, *, room: int = 0, revision: str | None = None, trust: bool = False) -> int | None:
    """The positions of a model, or of a Hub ID or folder, less `room`; None where its config does not say.

    An adapter's folder has no config of its own: what is loaded from it is asked later.
    """
    config = getattr(model, "config", None)
    if isinstance(model, str):
        name, revision = split_revision("model", model, revision)
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
        except (OSError, ValueError):  # loading the model explains what is wrong
            return None
    positions = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions - room if isinstance(positions, int) else None
