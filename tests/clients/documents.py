"""The examples of docs/clients.md, which are run as they stand there.

Each one is a fenced block after a comment with its name and the command that installs it:

    <!-- client: openai -->
    `pip install openai==3.57.0`:

    ```python
    ...
    ```
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_EXAMPLE: Final = re.compile(
    r"^<!-- client: (?P<name>[\w.-]+)(?P<fields>(?:; \w+: [^;\n]+?)*) -->\n"
    r"(?:`(?:pip|npm) install (?P<packages>[^`\n]+)`:\n\n)?"
    r"```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

HTTP: Final = "127.0.0.1:8000"
GRPC: Final = "127.0.0.1:50051"
"""The addresses in the examples, in place of which those of the test's server are put."""


@dataclass(frozen=True, slots=True)
class Example:
    """An example for one client.

    Attributes:
        name: name of the client and of its environment.
        language: "python", "js" or "sh".
        packages: what its environment has, with versions: of npm for "js", else of PyPI.
        flagged: whether it is run only when asked for by name, because its environment is large.
        variable: name of the environment variable that names the Python of an environment which
            was made by hand, for a client that no list of packages installs; else "".
    """

    name: str
    language: str
    code: str
    packages: tuple[str, ...]
    flagged: bool
    variable: str = ""

    def at(self, http: str, grpc: str) -> str:
        """The code with the addresses of a server, as host:port."""
        return self.code.replace(HTTP, http).replace(GRPC, grpc)


def examples(document: Path) -> list[Example]:
    """All examples of a document, in its order. Raises ValueError if two have one name."""
    found = []
    for match in _EXAMPLE.finditer(document.read_text("utf-8")):
        pairs = [field.split(": ", 1) for field in match["fields"].split("; ") if field]
        fields = {name: value.strip() for name, value in pairs}
        found.append(
            Example(
                match["name"],
                match["language"],
                match["code"],
                tuple(shlex.split(match["packages"] or "")),
                fields.get("run") == "by flag",
                fields.get("python", ""),
            )
        )
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{document} has two examples of one name: {sorted(names)}")
    return found
