"""The files of the store: content by digest, uploads, and the store's id."""
