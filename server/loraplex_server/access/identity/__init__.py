"""How callers prove who they are: the files of principals and keys, certificates and tokens."""
