"""Training jobs: their calls, what happened to them, and files of examples."""
