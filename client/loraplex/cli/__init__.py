"""The command `loraplex`: a client for the shell.

Results go to standard output, everything else to standard error. `session` lists the exit statuses.
"""

from __future__ import annotations

import typer

from loraplex import channel
from loraplex.cli import adapters, chat, generate, health, model, pull, terminal, train
from loraplex.cli.command import add_root_options, command
from loraplex.cli.views import embed, top

app = typer.Typer(
    name="loraplex",
    help="Generate text with a Loraplex server and manage its adapters.",
    epilog="Exit codes: 0 ok, 1 server fault, 2 usage or invalid request, 3 not found, "
    "4 unavailable, 5 deadline exceeded, 6 refused, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

add_root_options(app)


command(app, "generate")(generate.generate)
command(app, "chat", json=False)(chat.chat)
command(app, "embed")(embed.embed)
command(app, "top", timeout=None)(top.top)
command(app, "model")(model.model)
command(app, "render")(model.render)
command(app, "tokenize")(model.tokenize)
command(app, "detokenize")(model.detokenize)
app.add_typer(adapters.app)
app.command("pull")(pull.pull)
app.add_typer(train.app)
command(app, "health", timeout=channel.HEALTH_TIMEOUT, with_key=False)(health.health)


def main() -> None:
    terminal.adapt_streams()
    app()
