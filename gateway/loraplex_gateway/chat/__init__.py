"""`/v1/chat/completions`: a conversation is answered, whole or in parts."""
