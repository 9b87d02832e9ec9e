"""Files of examples that clients upload, for training jobs to name."""
