"""`loraplex-server`: finds the command, and imports only what that command needs."""

from __future__ import annotations

import gc
import sys

import typer
from loraplex_model.base.terminal import adapt_output


def main() -> None:
    """The console script. An error that nothing has handled is logged, and is an exit code too."""
    adapt_output()
    try:
        _program()()
    except Exception as error:
        from loraplex_server.runtime.failures import unexpected

        sys.exit(unexpected(error))


def _program() -> typer.Typer:
    """The program of `serve` alone, which is there sooner, or that of all commands."""
    gc.disable()  # imports leave no garbage
    try:
        if sys.argv[1:2] == ["serve"]:
            from loraplex_server.commands import serve
            from loraplex_server.declared.named import spread

            sys.argv[1:] = spread(sys.argv[1:])
            return serve.program()
        from loraplex_server.commands import program

        return program.app
    finally:
        gc.enable()


if __name__ == "__main__":
    main()
