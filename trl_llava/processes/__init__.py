"""Runs of several processes, and what they must agree on."""
