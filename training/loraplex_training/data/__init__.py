"""From lines of JSON to micro-batches.

`load` reads, tokenises and divides; `Batches` says what each step learns; `show` draws both for
people. Nothing here depends on the time, the machine or the order in which it is called.
"""

from loraplex_training.data.batches import Batches, in_order
from loraplex_training.data.dataset import Counts, Dataset, Report, load

__all__ = ["Batches", "Counts", "Dataset", "Report", "in_order", "load"]
