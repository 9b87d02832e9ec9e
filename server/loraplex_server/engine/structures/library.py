"""llguidance with the limits of this server: its view of a tokenizer, and matchers of grammars.

The front and the engine use the same limits, so a grammar that the front has found acceptable is
built in the engine as well, in the same time.

The library turns its own panics into errors of the matcher, and its methods do not raise for a
grammar at fault, for a token that does not fit, or when a limit is reached. Such a matcher is in
error and stays so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

STEP_LEXER_FUEL = 200_000
"""Most work on lexemes for one mask: some 15 ms."""
STEP_ITEMS = 50_000
"""Most items of the parser for one mask or token."""
ROW_ITEMS = 500
JSON_ROW_ITEMS = 2000
"""Most items of the parser at once, of a grammar and of a JSON schema. An ambiguous grammar costs
as much as their square for every token; a schema has four for each property that may be left out.
"""
LEXER_STATES = 100_000
"""Most states of a grammar's lexer, of up to 2 KB each."""


def read_tokenizer(path: Path, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> LLTokenizer:
    """Reads a `tokenizer.json`; `vocab_size` is that of the logits. Takes about 0.1 s.

    Raises OSError, and ValueError for a tokenizer whose tokens are not bytes of text.
    """
    from llguidance import LLTokenizer

    ends = [token for token in eos_token_ids if token < vocab_size]
    return LLTokenizer(
        path.read_text("utf-8"),
        n_vocab=vocab_size,
        eos_token=ends or None,
        slices=LLTokenizer.general_slices(),
    )


def new_matcher(tokenizer: LLTokenizer, grammar: str, is_json: bool) -> LLMatcher:
    """A matcher at the beginning of a text. If the grammar is at fault, the matcher is in error.

    Takes up to a second for a grammar of many thousand parts, without the interpreter's lock.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_items_in_row=JSON_ROW_ITEMS if is_json else ROW_ITEMS,
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=LEXER_STATES,
        verbose_errors=False,
    )
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
