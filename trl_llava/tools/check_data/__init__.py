"""`trl-llava check-data`: all rows of a recipe, checked before its run."""
