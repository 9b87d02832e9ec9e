"""Readers that take a completion's text apart while it arrives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from loraplex_gateway.tools.deltas import CallDelta, TextDelta, ToolDelta
from loraplex_gateway.tools.formats.base import FunctionCall, ToolFormat
from loraplex_gateway.tools.functions import Function
from loraplex_gateway.tools.grammar import Wire
from loraplex_gateway.tools.source import Malformed, Source, Steps


class ToolReader(Protocol):
    """Turns the text of one completion into text to show and calls.

    However the text is divided, all parts together are the same, and no text is lost: what is no
    call is shown.
    """

    @property
    def called(self) -> bool:
        """Whether a call has been found."""

    @property
    def is_open(self) -> bool:
        """Whether a call has begun and its arguments have not ended."""

    def feed(self, text: str) -> list[ToolDelta]:
        """Takes more text; returns what is certain by now."""

    def end(self) -> list[ToolDelta]:
        """Takes the end of the text; returns the rest."""


class PlainReader:
    """All text is shown."""

    called: Final = False
    is_open: Final = False

    def feed(self, text: str) -> list[ToolDelta]:
        return [TextDelta(text)] if text else []

    def end(self) -> list[ToolDelta]:
        return []


class DeltaSink:
    """The parts that a reading has found and nobody has taken yet.

    `once` drops all calls but the first.

    Attributes:
        calls: number of calls that have begun.
        is_open: whether the arguments of the last one have not ended.
    """

    def __init__(self, new_id: Callable[[], str], once: bool) -> None:
        self._new_id = new_id
        self._once = once
        self._deltas: list[ToolDelta] = []
        self.calls = 0
        self.is_open = False

    def show(self, text: str) -> None:
        if text:
            self._deltas.append(TextDelta(text))

    def begin(self, name: str) -> None:
        """Begins a call."""
        self.calls += 1
        self.is_open = True
        if self._is_wanted:
            self._deltas.append(CallDelta(self.calls - 1, id=self._new_id(), name=name))

    def arguments(self, text: str) -> None:
        """Adds to the arguments of the last call."""
        if text and self._is_wanted:
            self._deltas.append(CallDelta(self.calls - 1, text))

    def whole(self) -> None:
        """Ends the arguments of the last call."""
        self.is_open = False

    def take(self) -> list[ToolDelta]:
        taken, self._deltas = self._deltas, []
        return taken

    @property
    def _is_wanted(self) -> bool:
        return self.calls == 1 or not self._once


class TextReading(Protocol):
    """A way to take text apart."""

    def steps(self, source: Source, out: DeltaSink) -> Steps[None]:
        """Reads the whole source."""


class SteppedReader:
    """A reader that goes on with a reading whenever text arrives."""

    def __init__(self, reading: TextReading, out: DeltaSink) -> None:
        self._source = Source()
        self._out = out
        self._steps = reading.steps(self._source, out)
        self._is_done = False

    @property
    def called(self) -> bool:
        """Whether a call has been found."""
        return self._out.calls > 0

    @property
    def is_open(self) -> bool:
        """Whether a call has begun and its arguments have not ended."""
        return self._out.is_open

    def feed(self, text: str) -> list[ToolDelta]:
        self._source.text += text
        return self._go_on()

    def end(self) -> list[ToolDelta]:
        self._source.ended = True
        return self._go_on()

    def _go_on(self) -> list[ToolDelta]:
        if not self._is_done:
            self._is_done = next(self._steps, self) is self
        return self._out.take()


class FreeReading:
    """Finds calls in text that may hold anything.

    A call is passed on once it is whole, since what turns out to be no call is shown as text. White
    space around calls is not shown.
    """

    def __init__(
        self, calls: ToolFormat, functions: Mapping[str, Function], hidden: Sequence[str] = ()
    ) -> None:
        self._format = calls
        self._functions = functions
        self._hidden = frozenset((*calls.marks.hidden, *hidden))
        self._marks = sorted({*calls.marks.openers, *self._hidden}, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")

    def steps(self, source: Source, out: DeltaSink) -> Steps[None]:
        shown = _Shown(out)
        if self._format.marks.at_start:
            yield from self._read("", source, shown)
        while opener := (yield from self._show(source, shown)):
            yield from self._read(opener, source, shown)
        shown.end()

    def _show(self, source: Source, shown: _Shown) -> Steps[str]:
        """Shows the text up to the next opener, which is read and returned; "" at the end."""
        while True:
            found = self._any.search(source.text, source.at)
            if found is not None:
                shown.say(source.text[source.at : found.start()])
                source.at = found.end()
                if found[0] not in self._hidden:
                    return found[0]
                continue
            end = self._certain(source.text, source.at)
            shown.say(source.text[source.at : end])
            source.at = end
            source.drop()
            if not (yield from source.more()):
                shown.say(source.text)
                source.at = len(source.text)
                return ""

    def _certain(self, text: str, begin: int) -> int:
        """The end of the text that can be no beginning of a mark."""
        longest = len(self._marks[0]) - 1 if self._marks else 0
        for at in range(max(begin, len(text) - longest), len(text)):
            if any(mark.startswith(text[at:]) for mark in self._marks):
                return at
        return len(text)

    def _read(self, opener: str, source: Source, shown: _Shown) -> Steps[None]:
        """Reads calls behind an opener. What is no call is shown, with the opener."""
        begin = source.at - len(opener)
        try:
            calls = yield from self._format.read(source, opener, self._functions)
        except Malformed:
            text = source.text[begin : source.at]
            for hidden in self._hidden:
                text = text.replace(hidden, "")
            shown.say(text)
        else:
            shown.call(calls)
        source.drop()


class _Shown:
    """Text and calls, without the white space around calls."""

    def __init__(self, out: DeltaSink) -> None:
        self._out = out
        self._space = ""
        self._follows_call = False

    def say(self, text: str) -> None:
        text = self._space + text
        if self._follows_call:
            text = text.lstrip()
            self._follows_call = not text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._out.show(shown)

    def call(self, calls: Sequence[FunctionCall]) -> None:
        self._space, self._follows_call = "", True
        for call in calls:
            self._out.begin(call.name)
            self._out.arguments(call.arguments)
            self._out.whole()

    def end(self) -> None:
        self._out.show(self._space)


class WireReading:
    """Reads calls whose form is enforced, so that their arguments are passed on as they come.

    Text that does not begin like a call is shown: it is the answer that may come instead, or a call
    that was cut off before its arguments.
    """

    def __init__(self, wire: Wire, functions: Mapping[str, Function]) -> None:
        self._wire = wire
        self._functions = functions

    def steps(self, source: Source, out: DeltaSink) -> Steps[None]:
        wire, lead = self._wire, self._wire.first
        while name := (yield from self._head(source, lead)):
            out.begin(name)
            try:
                yield from source.json(out.arguments)
            except Malformed:
                break
            out.whole()
            if wire.closing and not (yield from source.take(wire.closing)):
                break
            source.drop()
            lead = wire.between
        if wire.last and out.calls:
            yield from source.take(wire.last)
        follows_call = out.calls > 0 and not out.is_open
        while True:
            text = source.text[source.at :]
            if follows_call:
                text = text.lstrip()
                follows_call = not text
            out.show(text)
            source.at = len(source.text)
            source.drop()
            if not (yield from source.more()):
                return

    def _head(self, source: Source, lead: str) -> Steps[str]:
        """The function whose call begins; "" if the text goes on in another way."""
        heads = {lead + self._wire.head(name): name for name in self._functions}
        return heads.get((yield from source.take(*heads)), "")
