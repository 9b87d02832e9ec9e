"""Mutations that keep an adapter well-formed: changed options, and tensors that still add up.

Bytes changed at random seldom get past the first check; these reach what lies behind it.
"""

from __future__ import annotations

import json
import random
from math import prod
from typing import Any

from fuzz.targets import join, split
from loraplex_adapters.format.kinds import KINDS
from loraplex_adapters.format.support import COMMON

SIZES = (0, 1, 2, 3, 8, 16, 31, 32, 40, 48, 64, 65, 257)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 64, 65, 2**62, 0.5, -1e300, "", "none", "all"),
    *("q_proj", ".*", "embed_tokens", "lora_only", [], {}, ["q_proj"], ["norm"], ["lm_head"]),
    *([0], [5, 3], [[0]], {"q_proj": 2}, {"embed_tokens": [1]}, {"q_proj.lora_E": [True]}),
)
OPTIONS = sorted({key for kind in KINDS.values() for key in kind.options} | set(COMMON))
ENDINGS = sorted({ending for kind in KINDS.values() for ending in kind.endings})
PATHS = (
    *("model.embed_tokens", "lm_head", "model.norm", "model.layers.0.mlp", "model.layers.1"),
    *(
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.self_attn",
    ),
    "model.layers.0.self_attn.k_norm",
)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few options or tensors changed; the input itself where it is not well-formed."""
    config, weights = split(data)
    try:
        options = json.loads(config)
        table = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        shapes = {k: list(v["shape"]) for k, v in table.items() if k != "__metadata__"}
        assert isinstance(options, dict)
        for _ in range(chance.randint(1, 3)):
            if chance.random() < 0.5:
                _change_option(options, chance)
            else:
                _change_tensor(shapes, chance)
        if sum(prod(shape) for shape in shapes.values()) > 1 << 16:
            return data
        return join(json.dumps(options).encode(), _weights(shapes, chance))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError):
        return data
    except OverflowError:  # the configuration has outgrown its two bytes of length
        return data


def _change_option(options: dict[str, Any], chance: random.Random) -> None:
    key = chance.choice(OPTIONS if chance.random() < 0.5 or not options else sorted(options))
    kind = chance.random()
    if kind < 0.2:
        options.pop(key, None)
    elif kind < 0.4:
        options["peft_type"] = chance.choice(sorted(KINDS))
    else:
        options[key] = chance.choice(VALUES)


def _change_tensor(shapes: dict[str, list[int]], chance: random.Random) -> None:
    name = chance.choice(sorted(shapes)) if shapes else "prompt_embeddings"
    shape = shapes.get(name) or [2, 32]
    kind = chance.random()
    if kind < 0.25:
        shapes.pop(name, None)
    elif kind < 0.5:
        ending = chance.choice(ENDINGS)
        path = chance.choice(PATHS)
        shapes[f"base_model.model.{path}.{ending}"] = chance.choice((shape, shape[::-1], [32]))
    elif kind < 0.9:
        shape[chance.randrange(len(shape))] = chance.choice(SIZES)
        shapes[name] = shape
    else:
        shapes[name] = shape[:1] if len(shape) > 1 else [*shape, 1]


def _weights(shapes: dict[str, list[int]], chance: random.Random) -> bytes:
    table: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * prod(shape)
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    if chance.random() < 0.1:
        table["__metadata__"] = {"loraplex_base_fingerprint": chance.choice(("", "x"))}
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)
