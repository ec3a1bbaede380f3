"""The memory that a recipe will need."""
