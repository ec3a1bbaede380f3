"""What comes after training: generate, chat, evaluate, and how good a reward model is."""
