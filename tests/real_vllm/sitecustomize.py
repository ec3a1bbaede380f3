"""Lets torchvision be imported beside a torch for CPUs; Python runs this file first if its folder is on the path.

torchvision's wheel is built for CUDA, and its import stops where its operations are missing. vLLM starts processes
that no other file of ours reaches.
"""

import sys
from types import ModuleType
from typing import Any


class BeforeTorchvision:
    """Names two operations when torchvision is about to be imported."""

    library: Any = None

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name == "torchvision" and cls.library is None:
            import torch

            cls.library = torch.library.Library("torchvision", "DEF")
            for operation in ("nms", "qnms"):
                cls.library.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, BeforeTorchvision)
