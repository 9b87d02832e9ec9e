"""The commands that show a server's engine, and texts as vectors."""
