"""An adapter's files: configuration, weights, kinds, and whether a base can serve them.

Owns every check that an adapter must pass before it is accepted; `examine` is its entrance. It
never writes a file, never follows a link out of a directory, and imports no torch.
"""
