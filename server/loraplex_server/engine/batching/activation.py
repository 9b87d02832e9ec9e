"""Where an activated LoRA begins to act in a request.

    prompt:   t t t t  i i i  t t     then what is generated
    computed: base---  adapter----    adapter---------------

Keys and values before the last occurrence `i i i` of the invocation tokens are the base's. Tokens
that are generated never move the beginning, as in PEFT's `generate`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

NEVER = 1 << 62
"""In place of an index, if the prompt does not contain the invocation tokens."""


def active_from(prompt: array[int], invocation: Sequence[int]) -> int:
    """Index of the first token that the adapter acts on; 0 if it has no invocation tokens.

    `prompt` is int32. Costs time proportional to the length of the prompt, and at most, for a
    prompt of repetitions, to the product of both lengths.
    """
    if not invocation:
        return 0
    tokens = np.frombuffer(prompt, np.int32)
    starts = np.arange(max(0, len(tokens) - len(invocation) + 1))
    for offset, token in enumerate(invocation):
        starts = starts[tokens[starts + offset] == token]
    return int(starts[-1]) if len(starts) else NEVER
