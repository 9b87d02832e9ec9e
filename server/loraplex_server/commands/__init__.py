"""The commands other than `serve`: store, export and doctor, and flags made from the settings."""
