"""Importers: adapters of other libraries, converted where the result is exactly equivalent."""
