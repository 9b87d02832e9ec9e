"""Training on request: a queue of jobs, each a supervised process. Imports no torch."""
