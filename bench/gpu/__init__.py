"""The stages of the check on a GPU: one module for each, with a function `run(report)`."""
