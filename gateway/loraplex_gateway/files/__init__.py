"""`/v1/files`: files of examples for fine-tuning, kept by the server."""
