"""The bytes that tensors hold while a piece of code runs, at their peak and by part.

What is counted is storage: views are free, and a tensor counts until the last reference to its storage is gone, one
that autograd keeps included. It works alike on real tensors and on tensors without memory: so the same code gives what
a step will need and what it did need. Not seen are buffers inside of a kernel, the CUDA context, and what an allocator
loses to fragments.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTrace(TorchDispatchMode):
    """Follows every storage that comes into being inside its `with` block.

    Example:
        >>> with MemoryTrace() as trace:
        ...     kept = torch.zeros(8) + torch.zeros(8)  # three tensors of 32 bytes at once
        >>> trace.peak, trace.live.total()
        (96, 32)
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"  # what storages that come now are counted as
        self.live: Counter[str] = Counter()  # bytes alive, by part
        self.peak = 0  # the most bytes that were alive at once
        self.at_peak: dict[str, int] = {}  # bytes alive at that moment, by part
        self._parts: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf, self.part)
        return result

    def hold(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Count tensors that were there before the block, or count known ones as another part."""
        for tensor in tensors:
            self._count(tensor, part)
            storage = tensor.untyped_storage()
            old = self._parts[storage._cdata]
            self.live[old] -= storage.nbytes()
            self.live[part] += storage.nbytes()
            self._parts[storage._cdata] = part

    def restart(self) -> None:
        """Forget the peak, so that the next one is found."""
        self.peak, self.at_peak = self.live.total(), dict(self.live)

    def _count(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._parts:
            return
        self._parts[key] = part
        self.live[part] += size
        weakref.finalize(storage, self._gone, key, size).atexit = False
        if self.live.total() > self.peak:
            self.peak, self.at_peak = self.live.total(), dict(self.live)

    def _gone(self, key: int, size: int) -> None:
        self.live[self._parts.pop(key)] -= size
