"""From lines of JSON to micro-batches.

`load` reads, tokenises and divides the examples; `Batches` lays out each step; `show` displays
examples. Results depend on the arguments only: not on time, machine or order of calls.
"""

from loraplex_training.data.batches import Batches, in_order
from loraplex_training.data.dataset import Dataset, load
from loraplex_training.data.report import Counts, DataReport

__all__ = ["Batches", "Counts", "DataReport", "Dataset", "in_order", "load"]
