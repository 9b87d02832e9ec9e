"""Control tokens: those that structure a conversation, and those that end an answer.

This room finds a base's control tokens, keeps them apart from the same characters in messages, and
collects the tokens that end a generation. It never renders a conversation.
"""
