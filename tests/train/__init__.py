"""A package, so that `train` here is not taken for the script `bench/train.py`."""
