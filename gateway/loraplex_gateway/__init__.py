"""OpenAI's HTTP interface in front of a Loraplex server.

A process of its own: it is a client of the server and imports neither torch nor the server's
packages, so whatever happens to it costs its own connections only.
"""
