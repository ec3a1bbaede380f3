"""Factually augmented RLHF for LLaVA-family models, as a thin layer over TRL."""

__version__ = "0.1.0.dev0"
