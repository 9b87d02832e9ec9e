"""The engine as a process of its own: its main loop, its socket, and the front's client of it.

Owns the socket and the life of the process. Never decides what is computed.
"""
