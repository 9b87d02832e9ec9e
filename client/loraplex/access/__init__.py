"""How a client reaches a server: with which encryption, and with which key its calls are sent.

Owns the rule that a key is never sent over a connection that others could read. Nothing here is
sent: `connection` opens the channel and makes the calls.
"""
