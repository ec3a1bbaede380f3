"""Answers from vLLM instead of the policy's own generation."""
