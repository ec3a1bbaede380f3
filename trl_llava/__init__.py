"""Factually augmented RLHF for LLaVA-family models, as a thin layer over TRL."""

import logging

# Where bitsandbytes is installed, importing it complains about an optional CPU kernel; 4 bit works without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0.dev0"
