"""Records of any data set to rows, checked before a run."""
