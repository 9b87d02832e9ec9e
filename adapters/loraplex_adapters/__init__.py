"""Adapters on disk, in four rooms:

    format    the files of an adapter, and whether a base can serve them
    store     registered adapters: their content, names, versions, aliases and labels
    load      from checked files to the changes in memory
    convert   adapters for and from other programs

`format` and `store` import no torch.
"""
