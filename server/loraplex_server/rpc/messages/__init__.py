"""Checks of requests, and conversion of results into replies."""
