"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning over the server's training jobs."""
