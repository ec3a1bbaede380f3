"""Tensors without memory, on which a trainer's own code runs: what floats hold is unknown, whole numbers are real.

So ids, masks, positions and lengths lead the code where they would lead it in a run. What it reads off a float (a
loss, whether that is finite, the token of the highest logit) is always 1.
"""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_ATEN = torch.ops.aten
_FACTORIES = {_ATEN.empty.memory_format, _ATEN.zeros.default, _ATEN.ones.default}


class NoMemory(TorchDispatchMode):
    """Lets floats that come into being inside its `with` block have a shape only; `fake` makes such tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            if func in _FACTORIES and (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point:
                with self.fake:
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        if func is _ATEN._local_scalar_dense.default:  # `.item()`
            return 1.0 if args[0].is_floating_point() else 1
        if func is _ATEN.eq.Scalar:  # Idefics3 leaves out tiles whose numbers are all 0
            return torch.full(args[0].shape, args[1] == 1)
        if func is _ATEN.index.Tensor:  # where a mask is true is known, which a fake tensor's index would not use
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        return tree_map_only(FakeTensor, _known, func(*args, **kwargs))

    def take(self, model: nn.Module) -> None:
        """Turn the tensors of a model on the meta device into ones of the CPU, in place; tied weights stay tied.

        Of the CPU, because autocast and the choice of an attention kernel go by the device.
        """
        taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the second only keeps the first's key its own
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in taken:
                        with self.fake:
                            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                            if isinstance(tensor, nn.Parameter):
                                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        taken[id(tensor)] = (fake, tensor)
                    tensors[name] = taken[id(tensor)][0]


def _places(index: Any) -> tuple[Any, ...]:
    """An index of a tensor, one that is a mask as the places where it is true."""
    is_mask = isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool
    return index.nonzero(as_tuple=True) if is_mask else (index,)


def _known(tensor: torch.Tensor) -> torch.Tensor:
    """A real tensor of ones in the place of whole numbers or truth values that come from floats."""
    return tensor if tensor.is_floating_point() else torch.ones(tensor.shape, dtype=tensor.dtype)
