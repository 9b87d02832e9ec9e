"""Models as OpenAI's clients know them: the base and every adapter has an id."""
