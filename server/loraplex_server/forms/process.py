"""The process that checks forms: `python -m loraplex_server.forms.process SETUP`.

SETUP is a `CheckSetup` as JSON. Standard input has forms and standard output their checks, each as
msgpack after its length, 4 bytes, little-endian. The process ends with its standard input.

A form is built exactly as the engine builds it, with a smaller stack, and its first mask is
computed. So what passes here neither overflows the engine's stack nor takes it long.

The first frame on standard output is empty and says that the process is ready. From then on nothing
is written to standard error, where the library's messages could repeat texts of clients.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from loraplex_server.engine.structures.library import new_matcher, read_tokenizer
from loraplex_server.forms.form import CheckedForm, StructureForm
from loraplex_server.forms.grammars import FormInvalid, grammar_of

STACK_BYTES = 8 << 20
"""An eighth of that of the engine's threads; see `engine.structures.workers`."""
NICENESS = 5
CHECK_BYTES = 2 << 30
"""Address space of a process; the library itself needs a tenth of it."""
ONE_OF = (
    "oneOf can be enforced only if its branches have different types or constants, or demand a "
    "property of which they list different texts; use anyOf instead"
)
MOST_SHOWN = 300
"""Characters of the library's message that a client gets."""


class CheckSetup(msgspec.Struct, frozen=True):
    """The tokenizer's file, the vocabulary of the logits, and the address space of the process."""

    tokenizer: str
    vocab_size: int
    memory: int
    eos_token_ids: list[int] = []

    def command(self) -> list[str]:
        """The command line that starts the process."""
        argument = msgspec.json.encode(self).decode()
        return [sys.executable, "-m", "loraplex_server.forms.process", argument]


class Checks:
    """Checks forms against one tokenizer. Raises OSError and ValueError if that cannot be read."""

    def __init__(self, setup: CheckSetup) -> None:
        self._tokenizer = read_tokenizer(
            Path(setup.tokenizer), setup.vocab_size, setup.eos_token_ids
        )
        self._ends = setup.eos_token_ids
        self._mask = np.zeros(-(-setup.vocab_size // 32), np.uint32)

    def check(self, form: StructureForm) -> CheckedForm:
        """The grammar of a form, or what is wrong with it."""
        try:
            return self._check(form)
        except BaseException:  # the library's panics are no `Exception`
            return CheckedForm(problem="cannot be compiled")

    def _check(self, form: StructureForm) -> CheckedForm:
        try:
            grammar = grammar_of(form)
        except FormInvalid as error:
            return CheckedForm(problem=shown(str(error)))
        matcher = new_matcher(self._tokenizer, grammar, form.is_json)
        if matcher.is_error():
            return CheckedForm(problem=shown(matcher.get_error()))
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if "NoExtensionBias" in matcher.get_error():
            return CheckedForm(problem="allows no text")
        if matcher.is_error():
            return CheckedForm(problem=f"is too complex: {shown(matcher.get_error())}")
        for token in self._ends:
            self._mask[token >> 5] &= ~np.uint32(1 << (token & 31))
        if not self._mask.any():
            return CheckedForm(problem="allows the empty text only")
        return CheckedForm(grammar)


def shown(error: str) -> str:
    """What a client is told of the library's message: its first line, shortened.

    The first line of an error in a regular expression is without the error itself.
    """
    if "Enable 'coerce_one_of'" in error:
        return ONE_OF
    lines = [line.strip() for line in error.splitlines()] or [""]
    reasons = [line for line in lines[1:] if line.startswith("error: ")]
    line = " ".join([lines[0], *reasons[:1]]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= MOST_SHOWN else line[: MOST_SHOWN - 1] + "…"


def main() -> int:
    """Answers until standard input ends; returns the exit status."""
    setup = msgspec.json.decode(sys.argv[1], type=CheckSetup)
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory, setup.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold texts of clients
    threading.stack_size(STACK_BYTES)
    failed = threading.Event()

    def work() -> None:
        try:
            serve(Checks(setup), sys.stdin.buffer, sys.stdout.buffer)
        except BaseException:
            failed.set()
            raise

    thread = threading.Thread(target=work, name="checks")
    thread.start()
    thread.join()
    return int(failed.is_set())


def serve(checks: Checks, source: BinaryIO, sink: BinaryIO) -> None:
    """Reads forms and writes their checks, until `source` ends."""
    sink.write(framed(CheckedForm()))
    sink.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    decoder = msgspec.msgpack.Decoder(StructureForm)
    while len(head := source.read(4)) == 4:
        form = decoder.decode(source.read(int.from_bytes(head, "little")))
        sink.write(framed(checks.check(form)))
        sink.flush()


def framed(message: StructureForm | CheckedForm) -> bytes:
    """A message with its length before it."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "little") + data


if __name__ == "__main__":
    sys.exit(main())
