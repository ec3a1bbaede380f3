"""A small drawn world on which the three stages run in minutes."""
