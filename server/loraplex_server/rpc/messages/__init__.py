"""Checks of requests, and replies made from what the server knows."""
