"""The shapes of an example, by the keys of its object.

Nothing unknown is guessed at: keys with information about an example are ignored and counted. Any
other unknown key is refused: it may be misspelt, or change the meaning of the example. The rows of
`table` say what is taken, `keys` selects the keys of a line, `read` makes its record of them.
"""

from loraplex_training.data.shapes.read import read_record
from loraplex_training.data.shapes.record import DataRecord, Message
from loraplex_training.data.shapes.table import CHATS, KEYS, NAMES, TEXT, WANTED
from loraplex_training.data.shapes.values import kind_of

SHAPES = NAMES
"""Names of the shapes."""

__all__ = [
    "CHATS",
    "KEYS",
    "SHAPES",
    "TEXT",
    "WANTED",
    "DataRecord",
    "Message",
    "kind_of",
    "read_record",
]
