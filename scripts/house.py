#!/usr/bin/env python3
"""Measures how the product's code is laid out, and prints the figures: make house

    python scripts/house.py [ROOT]

The product is the Python and C++ code of the five packages: client, model, adapters, training and
server. The generated stubs (`client/loraplex/v1`), tests, benchmarks and examples do not count.

lines       physical lines, blank ones and documentation included; `product_lines` is their sum
code        lines that hold a token of code: neither blank lines, comments nor docstrings
widest      the folder with the most Python modules directly in it, `__init__.py` left out
doubled     public class names that are defined more than once
long        functions over 60 lines, from `def` to the last line, and files over 400 lines
regex       regular expressions of server and training that are not in `PATTERNS` below. A pattern
            may describe a grammar, such as that of names and ids. It must not recover structure
            from a sentence, such as an error message or a line of a log: what code has to read is
            passed as data. So every pattern needs an entry that says what it matches.

An older tree can be measured by giving its root; what it keeps inside a package, such as example
data sets (`train/tasks`), is counted there. Needs the standard library only. The last line of
output is one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {
    "client": "client/loraplex",
    "model": "model/loraplex_model",
    "adapters": "adapters/loraplex_adapters",
    "training": "training/loraplex_training",
    "gateway": "gateway/loraplex_gateway",
    "server": "server/loraplex_server",
}
STUBS = "client/loraplex/v1"
LONG_FUNCTION, LONG_FILE = 60, 400

PATTERNS = {
    r"[0-9a-f]{12}-[0-9a-f]{8}": "ids of training jobs",
    r"[0-9a-f-]{1,64}": "ids of training jobs",
    r"[A-Za-z0-9_-]{1,64}": "ids of uploads",
    r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?": "names of adapters",
    r"[1-9][0-9]{0,9}|sha256:[0-9a-f]{64}": "versions and digests in an adapter's id",
    r"sha256:[0-9a-f]{64}": "digests",
    r"[a-z0-9][a-z0-9._/-]{0,62}": "keys of labels",
    r"[a-z][a-z0-9_]{0,63}": "names of training options",
    r"[\w.-]+/[\w.-]+": "hub ids",
    r"[^a-z0-9]+": "a job's name, made of option values",
    r"\s+": "line breaks of help texts",
    r"(?<![\w.>])~?(?:/[^\s/:;,'\"`()\[\]{}<>|]+)+/([^\s/:;,'\"`()\[\]{}<>|]+)": (
        "absolute paths, which are cut from what a client is shown"
    ),
    "`+": "the fence of a Markdown block",
    "expression": "the user's own expression over an answer",
}
"""What each allowed pattern matches. A pattern that is no literal goes by its source text."""

PROSE = ("server", "training", "adapters/train")
"""Packages whose patterns are looked at: their processes report to each other."""

CALLS = {"compile", "match", "search", "fullmatch", "findall", "finditer", "sub", "subn", "split"}

Node = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the product. `room` is its folder, from the package down."""

    path: Path
    room: str
    text: str

    @property
    def lines(self) -> int:
        """Number of physical lines."""
        return len(self.text.splitlines())

    @property
    def is_python(self) -> bool:
        """Whether the file is Python; all others are C++."""
        return self.path.suffix == ".py"


def sources(root: Path) -> list[Source]:
    """Returns the product's files below `root`, sorted by path. Packages may be missing."""
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*")):
            place = path.relative_to(root)
            if path.suffix not in {".py", ".h", ".cpp"} or place.is_relative_to(STUBS):
                continue
            room = "/".join([package, *path.relative_to(root / folder).parts[:-1]])
            found.append(Source(place, room, path.read_text("utf-8")))
    return found


def code_lines(source: Source) -> int:
    """Returns the number of lines that hold a token of code."""
    if not source.is_python:
        text = re.sub(r"/\*.*?\*/", "", source.text, flags=re.DOTALL)
        return sum(bool(line.split("//")[0].strip()) for line in text.splitlines())
    ignored = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENCODING, tokenize.ENDMARKER,
    }  # fmt: skip
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in ignored:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source.text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            held.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(held)


def patterns(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields line and pattern of every call of the modules `re` and `regex`."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        pattern = node.args[0]
        if ast.unparse(node.func.value) in {"re", "regex"} and node.func.attr in CALLS:
            literal = isinstance(pattern, ast.Constant)
            yield node.lineno, pattern.value if literal else ast.unparse(pattern)


def print_rooms(files: list[Source]) -> tuple[int, int]:
    """Prints the table of rooms. Returns the sums of physical lines and of code lines."""
    rooms: dict[str, list[Source]] = defaultdict(list)
    for source in files:
        rooms[source.room].append(source)
    width = max(map(len, rooms))
    print(f"{'room':<{width}}  files  lines   code\n{'-' * width}  -----  -----  -----")
    totals = [0, 0, 0]
    for room, members in rooms.items():
        row = [len(members), sum(s.lines for s in members), sum(map(code_lines, members))]
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        print(f"{room:<{width}}  {row[0]:>5}  {row[1]:>5}  {row[2]:>5}")
    print(f"{'product':<{width}}  {totals[0]:>5}  {totals[1]:>5}  {totals[2]:>5}\n")
    return totals[1], totals[2]


def print_widest(files: list[Source]) -> int:
    """Prints each package's widest folder. Returns the number of modules in the widest of all."""
    modules = Counter(s.room for s in files if s.is_python and s.path.name != "__init__.py")
    print("widest folder of each package, in modules")
    widest = {}
    for room, count in modules.most_common():
        widest.setdefault(room.split("/")[0], (room, count))
    for room, count in widest.values():
        print(f"  {count:>3}  {room}")
    return max(modules.values())


def main() -> None:
    """Prints the tables, the lists and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1])
    files = sources(parser.parse_args().root)
    lines, code = print_rooms(files)
    widest = print_widest(files)

    classes: dict[str, list[str]] = defaultdict(list)
    functions, regexes = [], []
    for source in filter(lambda s: s.is_python, files):
        tree = ast.parse(source.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(f"{source.path}:{node.lineno}")
            elif isinstance(node, Node) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > LONG_FUNCTION:
                    functions.append(f"{length}  {source.path}:{node.lineno} {node.name}")
        if source.room.startswith(PROSE):
            found = ((line, text) for line, text in patterns(tree) if text not in PATTERNS)
            regexes += [f"{source.path}:{line} {text}" for line, text in found]
    doubled = {name: places for name, places in classes.items() if len(places) > 1}
    _list("public class names defined more than once", map(" ".join, _rows(doubled)))
    _list(f"functions over {LONG_FUNCTION} lines", functions)
    _list(f"files over {LONG_FILE} lines", _long_files(files))
    _list("regular expressions that are not on the list of allowed ones", regexes)
    figures = {
        "doubled_class_names": len(doubled),
        "widest_folder": widest,
        "regex_over_prose": len(regexes),
        "product_lines": lines,
        "code_lines": code,
        "functions_over_60_lines": len(functions),
        "files_over_400_lines": len(_long_files(files)),
    }
    print(json.dumps(figures))


def _rows(doubled: dict[str, list[str]]) -> Iterator[list[str]]:
    return ([name, *places] for name, places in sorted(doubled.items()))


def _long_files(files: list[Source]) -> list[str]:
    return [f"{s.lines}  {s.path}" for s in files if s.lines > LONG_FILE]


def _list(title: str, rows: Iterator[str] | list[str]) -> None:
    rows = list(rows)
    print(f"\n{title}: {len(rows)}")
    for row in rows:
        print(f"  {row}")


if __name__ == "__main__":
    main()
