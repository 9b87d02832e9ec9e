"""What an adapter is on disk: its format, its validation and its store. Imports no torch."""
