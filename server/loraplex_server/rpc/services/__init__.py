"""The services: one module for each, and what only one of them needs."""
