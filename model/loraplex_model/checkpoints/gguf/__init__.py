"""GGUF files as base models.

`header` parses a file, `parts` finds the files of a split model, `keys` reads the metadata as a
`config.json`, `names` assigns the tensors to modules, and `source` reads them.
"""
