"""The parts of PPO's loop."""
