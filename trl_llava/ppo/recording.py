"""Records work of a GPU as a CUDA graph, and leaves torch as it was where that fails."""

from collections.abc import Callable

import torch

_given_up: list[torch.cuda.CUDAGraph] = []
"""Recordings that failed: torch's allocator of pinned memory goes on asking them whether they want an allocation."""


def record(step: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Record a step that computes nothing now; returns the graph and the tensor that its replays write.

    A RuntimeError says why a step cannot be recorded; nothing of the attempt is left then, and the step can be run.
    """
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        # Other threads go on: one pins batches, another watches NCCL.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            written = step()
    except RuntimeError as failure:
        _leave(graph, stream, pool)
        # A recording that CUDA has given up cannot be ended either, which hides why.
        raise RuntimeError(str(failure.__context__ or failure).splitlines()[0]) from failure
    return graph, written


def _leave(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """End what a failed recording has begun.

    torch ends a recording by asking CUDA for the graph. Where CUDA has given it up, that raises, and what would follow
    is left undone: going back to the stream, and telling the allocator, which else stops at the next `empty_cache`.
    """
    torch.cuda.set_stream(stream)
    try:
        graph.pool()  # known once the recording has ended
    except RuntimeError:
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
        _given_up.append(graph)
