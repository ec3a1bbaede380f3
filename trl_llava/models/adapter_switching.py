"""Which adapter of a model computes, without touching what is trainable.

`PeftModel.set_adapter` and `disable_adapter` turn gradients on and off as they switch: a backward pass over policy and
value then gives one of them a gradient of exactly 0, silently. `active_adapter` changes only which weights the forward
pass reads.

Gradient checkpointing runs a forward pass again inside the backward pass, when another role may be active:
`checkpoint_contexts` makes the second run compute with the adapter of the first.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

SwitchedLayer: TypeAlias = BaseTunerLayer | AuxiliaryTrainingWrapper
# Of each PEFT model: the adapters that it had when its layers were listed, and the layers. Checkpointing switches once
# for each layer of a backward pass, too often to walk through all modules.
_LAYERS: WeakKeyDictionary[PeftModel, tuple[list[tuple[str, int]], list[SwitchedLayer]]] = WeakKeyDictionary()


@contextmanager
def active_adapter(model: PeftModel, name: str | None) -> Iterator[PeftModel]:
    """Let one adapter compute inside a `with` block, or none: the bare base model with its own head.

    Heads and other modules that were saved with an adapter switch with it. No parameter's `requires_grad` changes.
    """
    if name is not None and name not in model.peft_config:
        raise ValueError(f"no adapter '{name}' in this model; it has {sorted(model.peft_config)}")
    layers = switched_layers(model)
    merged = next((layer.merged_adapters for layer in layers if layer.merged_adapters), None)
    if merged:
        raise ValueError(f"adapter {merged} is merged into the base weights; call model.unmerge_adapter() first")
    # PEFT has no public way to switch without changing requires_grad, so its two private fields are set and restored.
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    model_before = (model.active_adapter, model.base_model.active_adapter)
    try:
        for layer in layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        if name is not None:  # the PEFT model itself reads them for its config and when it saves
            model.active_adapter = model.base_model.active_adapter = name
        yield model
    finally:
        for layer, adapters, disabled in before:
            layer._active_adapter, layer._disable_adapters = adapters, disabled
        model.active_adapter, model.base_model.active_adapter = model_before


def switched_layers(model: PeftModel) -> list[SwitchedLayer]:
    """LoRA layers and wrappers of modules that are saved with an adapter, listed once for each set of adapters."""
    adapters = [(name, id(config)) for name, config in model.peft_config.items()]
    known = _LAYERS.get(model)
    if known is None or known[0] != adapters:
        layers = [module for module in model.modules() if isinstance(module, SwitchedLayer)]
        _LAYERS[model] = known = (adapters, layers)
    return known[1]


def checkpoint_contexts(
    model: PeftModel,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """A `context_fn` for `torch.utils.checkpoint`: each recomputation runs with the adapter of its forward pass."""
    return lambda: (nullcontext(), _AsItWas(model))


class _AsItWas(AbstractContextManager[None]):
    """The adapter that was active when this was made, each time it is entered: a graph may be run backward twice."""

    def __init__(self, model: PeftModel) -> None:
        layer = next(layer for layer in switched_layers(model) if isinstance(layer, BaseTunerLayer))
        if len(layer.active_adapters) != 1:
            raise ValueError(f"one adapter must be active in a forward pass, found {layer.active_adapters}")
        self.model = model
        self.name = None if layer.disable_adapters else layer.active_adapters[0]
        self.blocks: list[AbstractContextManager[PeftModel]] = []

    def __enter__(self) -> None:
        block = active_adapter(self.model, self.name)
        block.__enter__()
        self.blocks.append(block)

    def __exit__(self, *exception: Any) -> bool | None:
        return self.blocks.pop().__exit__(*exception)
