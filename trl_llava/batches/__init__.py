"""Rows to token ids and tensors."""
