"""Adapters of the kinds that fold into A and B at load, as PEFT writes them."""

from __future__ import annotations

from adapters import served_cases
from adapters.peft_files import HEAD, TIED, Case, Q

FIRST = (0, Q)
LOHA = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"

CASES: dict[str, Case] = {
    "loha": Case(
        "llama",
        "LoHaConfig",
        {"target_modules": [Q, "lm_head", "down_proj"], "r": 3, "alpha": 60},
        {FIRST: LOHA, HEAD: LOHA, (0, "down_proj"): LOHA},
    ),
    **served_cases.CASES,
}
"""What is served. PEFT cannot load all of them over `Linear4bit`."""
