"""Exits with an error message if torch finds no CUDA device (`make test-gpu`, `bench-gpu`)."""

import sys

import torch

if not torch.cuda.is_available():
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    sys.exit(
        f"This target needs a CUDA device. torch {torch.__version__} ({built}) finds none;"
        " `make test` runs everything that works on a CPU."
    )
print(f"CUDA device: {torch.cuda.get_device_name()}")
