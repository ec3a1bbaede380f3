"""Models for each role, on bases that they share."""
