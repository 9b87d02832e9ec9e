"""A gateway without a server, for tests of the console: the real shapes, invented content.

    python tests/console/fake_gateway.py

It prints its URL and serves until its standard input ends. `POST /fake` changes how it behaves:
`{"away": true}` answers everything with 503, `{"key": "k"}` wants that key, `{"load": true}` fills
the batch. `{}` goes back to the start.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import cast

import fake_adapters
import fake_answers
import fake_training
import uvicorn
from loraplex_gateway.console import routes as console
from loraplex_gateway.context import Context
from loraplex_gateway.settings import GatewaySettings
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send


class Behaviour:
    """What `POST /fake` has set."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Goes back to the start."""
        self.away = False
        self.key = ""
        self.load = False


class Guard:
    """Answers in place of the application while the server is away or the key is wrong."""

    def __init__(self, app: ASGIApp, behaviour: Behaviour) -> None:
        self._app = app
        self._behaviour = behaviour

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or path.startswith(("/console", "/fake")) or path == "/":
            await self._app(scope, receive, send)
        elif self._behaviour.away:
            answer = failure(503, "the server does not answer: UNAVAILABLE", "unavailable")
            await answer(scope, receive, send)
        elif path.startswith("/v1") and not self._allowed(scope):
            await failure(401, "the key is not valid", "invalid_api_key")(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return not self._behaviour.key or given == f"Bearer {self._behaviour.key}".encode()


def failure(status: int, message: str, code: str, param: str | None = None) -> Response:
    """An error of OpenAI's shape."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": error}, status)


def guarded(
    work: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """The handler with its `Refused` as an error response."""

    async def handler(request: Request) -> Response:
        try:
            return await work(request)
        except fake_adapters.Refused as error:
            return failure(error.status, str(error), error.code)

    return handler


def build() -> Starlette:
    """The application."""
    behaviour = Behaviour()
    adapters = fake_adapters.Adapters()
    running = fake_answers.Running()

    async def change(request: Request) -> Response:
        changes = await request.json()
        if not changes:
            behaviour.reset()
            adapters.reset()
        for name, value in changes.items():
            setattr(behaviour, name, value)
        return Response()

    async def health(_: Request) -> Response:
        return Response()

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": adapters.cards()})

    async def watch(request: Request) -> Response:
        seconds = float(request.query_params.get("interval", "0.25"))
        return fake_answers.watch(adapters, running, seconds, lambda: behaviour.load)

    async def chat(request: Request) -> Response:
        return await fake_answers.answer(await request.json(), adapters, running, chat=True)

    async def text(request: Request) -> Response:
        return await fake_answers.answer(await request.json(), adapters, running, chat=False)

    parts: list[Route] = [
        Route("/fake", change, methods=["POST"]),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/engine/watch", watch),
        Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
        Route("/v1/completions", guarded(text), methods=["POST"]),
        *(
            Route(path, guarded(handler), methods=[method])
            for method, path, handler in (
                *fake_adapters.handlers(adapters),
                *fake_training.handlers(adapters),
            )
        ),
    ]
    context = cast(Context, SimpleNamespace(settings=GatewaySettings()))
    return Starlette(
        routes=[*parts, *console.routes(context)],
        middleware=[Middleware(Guard, behaviour=behaviour)],
    )


def main() -> None:
    """Serves on a free port, which the first line of output names."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", int(os.environ.get("PORT", "0"))))
    print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}/"}), flush=True)
    server = uvicorn.Server(
        uvicorn.Config(build(), log_level="warning", timeout_graceful_shutdown=1)
    )

    def end() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end, daemon=True).start()
    asyncio.run(server.serve([listener]))


if __name__ == "__main__":
    main()
