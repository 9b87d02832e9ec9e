"""Adapters that the operator declares: named in the settings, or as folders of a directory."""
