"""What a server shows beside its completions: texts as vectors, and the batch of its engine."""
