"""Sends one prompt to the base model and to every adapter at once; they share the server's batches.

python examples/async_fanout.py                    # the server at 127.0.0.1:50051
python examples/async_fanout.py HOST:PORT "A prompt"
"""

from __future__ import annotations

import asyncio
import sys

from loraplex import AsyncClient, Completion, LoraplexError


async def ask(client: AsyncClient, prompt: str, adapter: str) -> Completion:
    messages = [{"role": "user", "content": prompt}]
    return await client.generate(
        messages=messages, adapter=adapter, max_new_tokens=48, temperature=0
    )


async def main(target: str = "127.0.0.1:50051", prompt: str = "Tell me about the sea.") -> None:
    async with AsyncClient(target) as client:
        names = ["", *(info.name for info in await client.list_adapters())]
        answers = await asyncio.gather(*(ask(client, prompt, name) for name in names))
    for name, answer in zip(names, answers, strict=True):
        digests = ", ".join(adapter.digest for adapter in answer.adapters)
        print(f"--- {name or 'base model'} {digests}\n{answer.text}")


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except LoraplexError as error:
        sys.exit(f"async_fanout: {error}")
