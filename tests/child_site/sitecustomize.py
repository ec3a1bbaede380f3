"""Python runs this file first in every process that has this folder in PYTHONPATH: what tests and vLLM start."""

import cpu_torchvision  # noqa: F401
