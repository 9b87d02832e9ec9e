"""The base model of a server: its description, and what it makes of texts and tokens."""
