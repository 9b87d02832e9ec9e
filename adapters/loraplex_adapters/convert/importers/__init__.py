"""Adapters of other libraries, turned into ours where that is exact."""
