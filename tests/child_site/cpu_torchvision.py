"""Lets torchvision be imported beside a torch for CPUs, once this module is imported.

torchvision's wheel on PyPI is built for CUDA. Beside a torch for CPUs its compiled part cannot be loaded, and its
import stops where it registers two operations of that part. With a build that fits, nothing is done here.
"""

import sys
from types import ModuleType
from typing import Any


class BeforeRegistrations:
    """Names the two operations when they are about to be registered and are not there."""

    library: Any = None

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name != "torchvision._meta_registrations" or cls.library is not None:
            return
        if not sys.modules["torchvision.extension"]._has_ops():
            import torch

            cls.library = torch.library.Library("torchvision", "DEF")
            for operation in ("nms", "qnms"):
                cls.library.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, BeforeRegistrations)
