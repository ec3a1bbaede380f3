"""Checkpoints that survive a kill, and runs that go on from them."""
