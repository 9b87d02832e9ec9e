"""Which tokens are control tokens, and where their spellings occur in a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_PLAIN: Final = re.compile(r"</?[A-Za-z_][\w.:-]*>|\w+")
"""A plain tag such as <think>, or a word: both are written by models themselves."""


class Spellings:
    """A set of strings that is found in texts in time linear in the text.

    Attributes:
        words: the strings.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = frozenset(word for word in words if word)
        self._starts = frozenset(w[:at] for w in self.words for at in range(1, len(w)))
        self._ends = frozenset(w[at:] for w in self.words for at in range(1, len(w)))
        self._longest = max(map(len, self.words), default=0)
        trie = _pattern(sorted(self.words)) if self.words else r"(?!)"
        self._word = re.compile(trie)
        self._first = re.compile(f"(?={trie})(.)", re.DOTALL)

    def occurs_in(self, text: str) -> bool:
        """Whether one of the words occurs in the text."""
        return self._word.search(text) is not None

    def at_start_of(self, text: str) -> str | None:
        """The longest word that the text begins with."""
        found = self._word.match(text)
        return found[0] if found else None

    def count(self, text: str) -> int:
        """How many words the text holds: from the left, the longest of each place."""
        return sum(1 for _ in self._word.finditer(text))

    def replace(self, text: str, by: Callable[[re.Match[str]], str]) -> str:
        """Replaces the words: from the left, the longest of each place."""
        return self._word.sub(by, text)

    def split_first(self, text: str, mark: str) -> str:
        """Inserts `mark` after the first character of every occurrence, overlapping ones too."""
        return self._first.sub(rf"\g<1>{mark}", text) if self.occurs_in(text) else text

    def begins_at_end_of(self, text: str) -> bool:
        """Whether the text ends in a beginning of a word, which a next text could complete."""
        sizes = range(1, min(self._longest, len(text) + 1))
        return any(text[-size:] in self._starts for size in sizes)

    def ends_at_start_of(self, text: str) -> bool:
        """Whether the text begins with an end of a word, which a text before it could complete."""
        sizes = range(1, min(self._longest, len(text) + 1))
        return any(text[:size] in self._ends for size in sizes)


def separable(tokenizer: Tokenizer) -> dict[str, AddedToken]:
    """The added tokens that may be control tokens of some template, by their spelling.

    White space, and tags and words that are no special tokens, are text. A special token of one
    character that the model also has for text is text, too: it has no other id.
    """
    tokens = {
        token.content: token
        for token in tokenizer.get_added_tokens_decoder().values()
        if token.content.strip() and (token.special or not _PLAIN.fullmatch(token.content))
    }
    if any(len(spelling) == 1 for spelling in tokens):
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        tokens = {s: token for s, token in tokens.items() if len(s) > 1 or s not in vocabulary}
    return tokens


def control_tokens(tokens: Mapping[str, AddedToken], template: str) -> frozenset[str]:
    """Those of `separable` that are control tokens of a template, given by its source.

    These are the special tokens, and all others that the template writes itself.
    """
    return frozenset(s for s, token in tokens.items() if token.special or s in template)


def _pattern(words: list[str]) -> str:
    """A regular expression of sorted words that branches on single characters, longest first."""
    shared = _shared(words[0], words[-1])
    rest = [word[shared:] for word in words if len(word) > shared]
    head = re.escape(words[0][:shared])
    if not rest:
        return head
    groups: list[list[str]] = []
    for word in rest:
        if groups and groups[-1][0][0] == word[0]:
            groups[-1].append(word)
        else:
            groups.append([word])
    optional = "?" if len(rest) < len(words) else ""
    return f"{head}(?:{'|'.join(map(_pattern, groups))}){optional}"


def _shared(first: str, last: str) -> int:
    """Length of the beginning that two words share."""
    pairs = zip(first, last, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))
