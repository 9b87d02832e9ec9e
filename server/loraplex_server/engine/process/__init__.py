"""The engine as a process of its own: main loop, socket, and the front's client.

Owns the socket and the lifetime of the process. Decides nothing about what is computed.
"""
