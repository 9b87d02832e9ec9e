"""Commands beside `serve`: the store, export and doctor, and flags made from the settings."""
