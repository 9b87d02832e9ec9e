"""Files of other programs: what they are, and how their names differ from PEFT's.

Turns the findings about such files into one sentence with the cause and the way out. Nothing here
decides whether an adapter is accepted: it explains what has been refused.
"""
