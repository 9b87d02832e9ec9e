"""Which names an expression matches, by the set of states that each character leads to.

The states are Thompson's ("Regular expression search algorithm", 1968): every character is read
once, whatever the expression is, so the time is at most states x characters and nothing is tried
again. `Work` bounds the sum over all names. A set of states that was reached before is not computed
again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from loraplex_adapters.format.expressions.grammar import (
    ANY,
    BIT,
    MAX_SIZE,
    Ahead,
    Anchor,
    Choice,
    NotEvaluated,
    OneOf,
    Repeat,
    Sequence,
    Tree,
    parse,
)
from loraplex_adapters.format.expressions.names import Names, Node

MAX_WORK = 20_000
"""Most steps for one field of a configuration: about 10 ms."""

_READ, _SPLIT, _ANCHOR, _AHEAD, _DONE = range(5)
_PLACES = ("start", "end", "boundary", "inside")
_START, _DOT, _LETTER = range(3)  # what precedes a position


class Work:
    """Steps that may still be taken; `spend` raises NotEvaluated when there are none."""

    def __init__(self, steps: int = MAX_WORK) -> None:
        self.left = steps

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise NotEvaluated("takes too many steps to evaluate")


@dataclass(frozen=True, slots=True)
class Program:
    """States of an expression. State n is (kind, argument, argument); the last is the end.

    Attributes:
        ahead: the programs of look-aheads.
    """

    states: tuple[tuple[int, int, int], ...]
    ahead: tuple[Program, ...]

    @property
    def size(self) -> int:
        """Number of states, those of look-aheads included."""
        return len(self.states) + sum(program.size for program in self.ahead)


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression over whole names, as `re.fullmatch` matches it.

    Raises NotEvaluated if it is not understood.
    """

    text: str

    def __post_init__(self) -> None:
        whole(self.text)

    def matches(self, names: Iterable[str]) -> frozenset[str]:
        """The names that the expression matches; raises NotEvaluated if that takes too long."""
        return find(whole(self.text), Names.of(names), Work())


@lru_cache(64)
def whole(text: str) -> Program:
    """The program of an expression that matches a whole name."""
    return _compile(parse(text))


@lru_cache(64)
def ending(text: str) -> Program:
    """The program of an expression that matches a name, or its part after any dot."""
    prefix = Repeat(Sequence((Repeat(OneOf(ANY), 0, None), OneOf(BIT["."]))), 0, 1)
    return _compile(Sequence((prefix, parse(text))))


def find(program: Program, names: Names, work: Work) -> frozenset[str]:
    """The names that a program matches. Raises NotEvaluated after `work` steps."""
    work.spend(program.size)
    run = _Run(program, work)
    return frozenset(run.below(names.root, run.first))


def _compile(tree: Tree) -> Program:
    return _Builder([MAX_SIZE]).program(tree)


class _Builder:
    """Writes the states of one program. `room` holds the states that all programs may still have.

    The states of a tree leave to the state that is appended next.
    """

    def __init__(self, room: list[int]) -> None:
        self._room = room
        self._states: list[tuple[int, int, int]] = []
        self._ahead: list[Program] = []

    def program(self, tree: Tree) -> Program:
        """The program of a tree; raises NotEvaluated if it is too large."""
        self._place(tree)
        self._add(_DONE)
        return Program(tuple(self._states), tuple(self._ahead))

    def _add(self, kind: int, one: int = 0, two: int = 0) -> int:
        self._room[0] -= 1
        if self._room[0] < 0:
            raise NotEvaluated(f"needs more than {MAX_SIZE} states, repeats written out")
        self._states.append((kind, one, two))
        return len(self._states) - 1

    def _place(self, tree: Tree) -> None:
        match tree:
            case OneOf(bits):
                self._add(_READ, bits)
            case Anchor(where):
                self._add(_ANCHOR, _PLACES.index(where))
            case Ahead(inner, negative):
                self._add(_AHEAD, len(self._ahead), int(negative))
                self._ahead.append(_Builder(self._room).program(inner))
            case Sequence(parts):
                for part in parts:
                    self._place(part)
            case Choice(options):
                self._choose(options)
            case Repeat(part, low, high):
                self._repeat(part, low, high)

    def _choose(self, options: tuple[Tree, ...]) -> None:
        ends = []
        for option in options[:-1]:
            fork = self._add(_SPLIT)
            self._place(option)
            ends.append(self._add(_SPLIT))
            self._states[fork] = (_SPLIT, fork + 1, len(self._states))
        self._place(options[-1])
        for end in ends:
            self._leave(end)

    def _repeat(self, part: Tree, low: int, high: int | None) -> None:
        for _ in range(low):
            # A state of its own, so that many repeats of an empty part are counted too.
            self._leave(self._add(_SPLIT))
            self._place(part)
        if high is None:
            fork = self._add(_SPLIT)
            self._place(part)
            self._add(_SPLIT, fork, fork)
            self._leave(fork, fork + 1)
            return
        forks = []
        for _ in range(high - low):
            forks.append(self._add(_SPLIT))
            self._place(part)
        for fork in forks:
            self._leave(fork, fork + 1)

    def _leave(self, fork: int, other: int | None = None) -> None:
        """Makes `fork` lead to the next state, and to another one."""
        end = len(self._states)
        self._states[fork] = (_SPLIT, end if other is None else other, end)


_Pledge = tuple[int, bool, int]
"""A look-ahead that was passed: its number, whether it is negative, and its set of states now."""

_Thread = tuple[int, frozenset[_Pledge]]
"""A state, and the look-aheads that the rest of the name must also satisfy."""

_MATCHED, _FAILED = -1, -2


class _Run:
    """The evaluation of one program: the sets of states that were reached, numbered.

    A look-ahead is followed as a second program beside the first, so every name is read once.
    """

    def __init__(self, program: Program, work: Work) -> None:
        self._states = program.states
        self._work = work
        self._ahead = [_Run(inner, work) for inner in program.ahead]
        self._sets: list[tuple[frozenset[_Thread], int]] = []
        self._numbers: dict[tuple[frozenset[_Thread], int], int] = {}
        self._next: dict[tuple[int, str], int] = {}
        self._verdicts: dict[tuple[int, str], int] = {}
        self._below: dict[tuple[int, int], list[str]] = {}
        self.first = self.beginning(_START)

    def beginning(self, previous: int) -> int:
        """The set of states of a program that begins after `previous`."""
        return self._number(frozenset({(0, frozenset[_Pledge]())}), previous)

    def below(self, node: Node, start: int) -> list[str]:
        """The names below a node, from there on, that match after the set of states `start`."""
        known = self._below.get((node.number, start))
        if known is not None:
            return known
        found: list[str] = []
        self._work.spend(1)
        for text, child in node.ways:
            reached = self._after(start, text)
            if not self._sets[reached][0]:
                continue
            if child is not None:
                found += [text + rest for rest in self.below(child, reached)]
            elif self._ends(reached, ""):
                found.append(text)
        self._work.spend(len(found) // 16)
        self._below[node.number, start] = found
        return found

    def verdict(self, number: int, following: str) -> int:
        """The set of states after a character, as long as it is open whether the program matches.

        Then _MATCHED or _FAILED. `following` is "" at the end of the name.
        """
        known = self._verdicts.get((number, following))
        if known is None:
            if self._ends(number, following):
                known = _MATCHED
            else:
                known = self._step(number, following) if following else _FAILED
                if known >= 0 and not self._sets[known][0]:
                    known = _FAILED
            self._verdicts[number, following] = known
        return known

    def _after(self, number: int, text: str) -> int:
        for character in text:
            number = self._step(number, character)
        return number

    def _step(self, number: int, character: str) -> int:
        known = self._next.get((number, character))
        if known is not None:
            return known
        bit, states = BIT[character], self._states
        after = set()
        for at, pledges in self._closure(number, character):
            if states[at][0] == _READ and states[at][1] & bit:
                kept = self._kept(pledges, character) if pledges else pledges
                if kept is not None:
                    after.add((at + 1, kept))
        reached = self._number(frozenset(after), _DOT if character == "." else _LETTER)
        self._next[number, character] = reached
        return reached

    def _ends(self, number: int, following: str) -> bool:
        """Whether the end of the program is reached; a whole name has nothing `following`."""
        last = len(self._states) - 1
        return any(
            at == last and self._kept(pledges, following) is not None
            for at, pledges in self._closure(number, following)
        )

    def _kept(self, pledges: frozenset[_Pledge], following: str) -> frozenset[_Pledge] | None:
        """What is still open of look-aheads after a character; None if one failed."""
        kept = set()
        for ahead, negative, number in pledges:
            verdict = self._ahead[ahead].verdict(number, following)
            if verdict >= 0:
                kept.add((ahead, negative, verdict))
            elif (verdict == _MATCHED) == negative:
                return None
        self._work.spend(len(pledges))
        return frozenset(kept)

    def _closure(self, number: int, following: str) -> set[_Thread]:
        """The threads that a set of states leads to without reading."""
        threads, previous = self._sets[number]
        seen: set[_Thread] = set()
        stack = list(threads)
        states = self._states
        while stack:
            thread = stack.pop()
            if thread in seen:
                continue
            seen.add(thread)
            at, pledges = thread
            kind, one, two = states[at]
            if kind == _SPLIT:
                stack += ((one, pledges), (two, pledges))
            elif kind == _ANCHOR:
                if _holds(one, previous, following):
                    stack.append((at + 1, pledges))
            elif kind == _AHEAD:
                pledge = (one, bool(two), self._ahead[one].beginning(previous))
                stack.append((at + 1, pledges | {pledge}))
        self._work.spend(len(seen) + 1)
        return seen

    def _number(self, threads: frozenset[_Thread], previous: int) -> int:
        key = (threads, previous)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._sets)
            self._sets.append(key)
        return number


def _holds(anchor: int, previous: int, following: str) -> bool:
    if anchor == 0:
        return previous == _START
    if anchor == 1:
        return not following
    boundary = (previous == _LETTER) != (following not in ("", "."))
    return boundary == (anchor == 2)
