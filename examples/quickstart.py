"""Asks a running server's base model and each of its adapters the same question.

python examples/quickstart.py                      # the server at 127.0.0.1:50051
python examples/quickstart.py HOST:PORT "A prompt"
"""

from __future__ import annotations

import sys

from loraplex import Client, LoraplexError


def main(target: str = "127.0.0.1:50051", prompt: str = "Tell me about the sea.") -> None:
    with Client(target) as client:
        names = [info.name for info in client.list_adapters()]
        for name in ["", *names]:
            print(f"--- {name or 'base model'}")
            messages = [{"role": "user", "content": prompt}]
            with client.stream(
                messages=messages, adapter=name, max_new_tokens=48, temperature=0
            ) as stream:
                for delta in stream:
                    print(delta.text, end="", flush=True)
            done = stream.completion()  # the whole answer, with finish reason and usage
            print(f"\n[{done.finish_reason}, {done.usage.completion_tokens} tokens]")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except LoraplexError as error:
        sys.exit(f"quickstart: {error}")
