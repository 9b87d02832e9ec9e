"""A package, so that `train` is this folder whatever else is on the path."""
