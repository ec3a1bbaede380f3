"""Published checkpoints to Hub layout, and adapters merged."""
