"""`trl-llava convert` and `merge`: published checkpoints in Hub layout, and adapters merged into their base."""
