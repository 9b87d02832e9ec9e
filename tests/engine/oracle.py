"""A model without weights, whose next token tells on every mistake of the engine.

The next token is a function of the sequence's tokens, of the adapters' digests and weights, and of
the position. It is computed from what the engine really set up: the KV memory reached through the
block table, and the contents published to the slots. A leaked or swapped block, a stale slot, an
off-by-one position, a lost or repeated token: each gives a wrong integer at once.

`continuation` computes the same function directly, from nothing but the request.

An adapter's `path` is either a JSON object of options or a directory, in which case the options are
read from `oracle.json` in it, if there is one, and the virtual tokens from its PEFT configuration.
Options: `nbytes` (else the size of the files), `fail` (an error reason for `read_adapter`),
`seconds` (how long reading takes), `nonfinite` (rows that use it get NaN logits), `virtual` (how
many virtual tokens it has), `invocation` (token ids: it acts from their last occurrence in the
prompt on, and on all tokens without this option), `merge_nbytes` (what its dense copies take; 0:
it cannot be merged), `merge_fail` (merging it raises), `kills` (the process is killed by the work
on it: "read", "publish", "merge" or "publish_merge"), `loses` (the device is lost by it, likewise).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from adapters.adapter_files import base_info
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.engine.messages import AdapterRef, ModelInfo, files_digest
from loraplex_server.engine.process.wire import DEVICE_VARIABLE
from loraplex_server.engine.runner.protocol import DeviceLost, OutOfDeviceMemory

MASK = (1 << 64) - 1
EMPTY = np.uint64(0xDEAD)


def mix64(x: int) -> int:
    """Scrambles 64 bits (the finaliser of SplitMix64)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def weights_hash(mix: list[tuple[str, float]]) -> int:
    """One number for an adapter state, given as (digest, weight) pairs in any order."""
    merged: dict[str, float] = {}
    for digest, weight in mix:
        merged[digest] = merged.get(digest, 0.0) + weight
    text = json.dumps([(d, round(float(np.float32(w)), 6)) for d, w in sorted(merged.items())])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def entry(token: int, position: int, weights: int) -> int:
    """What a token leaves in the KV cache."""
    return mix64((token * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + weights) & MASK)


def next_token(entries: np.ndarray, vocab_size: int, forbidden: frozenset[int]) -> int:
    """The token that follows a sequence with these KV entries (uint64, in order)."""
    odd = np.arange(1, 2 * len(entries), 2, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = int((entries * odd).sum(dtype=np.uint64))
    token = mix64(state) % vocab_size
    while token in forbidden:
        token = (token + 1) % vocab_size
    return token


def state_after(entries: np.ndarray, width: int) -> np.ndarray:
    """The final state of the last token of a sequence with these KV entries; float32 [width]."""
    odd = np.arange(1, 2 * len(entries), 2, dtype=np.uint64)
    with np.errstate(over="ignore"):
        seed = int((entries * odd).sum(dtype=np.uint64))
    numbers = [mix64((seed + 0x9E3779B97F4A7C15 * (j + 1)) & MASK) >> 40 for j in range(width)]
    return (np.array(numbers) / (1 << 23) - 1).astype(np.float32)


def states(
    prompt: list[int],
    mix: list[tuple[str, float]],
    width: int = 16,
    vocab_size: int = 512,
    virtual: int = 0,
    active: int | None = 0,
) -> np.ndarray:
    """The final states of a prompt's tokens, float32 [n, width]; arguments as of `continuation`."""
    tokens = [vocab_size + j for j in range(virtual)] + prompt
    base, weights = weights_hash([]), weights_hash(mix)
    entries = np.array(
        [
            entry(token, position, weights if active is not None and position >= active else base)
            for position, token in enumerate(tokens)
        ],
        np.uint64,
    )
    ends = range(virtual + 1, len(tokens) + 1)
    return np.array([state_after(entries[:end], width) for end in ends])


def continuation(
    prompt: list[int],
    mix: list[tuple[str, float]],
    count: int,
    vocab_size: int = 512,
    forbidden: frozenset[int] = frozenset(),
    virtual: int = 0,
    active: int | None = 0,
    ends: frozenset[int] = frozenset(),
    least: int = 0,
) -> list[int]:
    """The `count` tokens that the oracle must answer greedily to `prompt` under `mix`.

    The first `least` tokens are none of `ends`, of which no two follow each other.

    `virtual` tokens stand before the prompt; they are those of the one adapter of the mix. The mix
    applies from index `active` of the prompt on; to no token if that is None.
    """
    tokens = [vocab_size + j for j in range(virtual)] + prompt
    base, weights = weights_hash([]), weights_hash(mix)
    entries = [
        entry(token, position, weights if active is not None and position >= active else base)
        for position, token in enumerate(tokens)
    ]
    out: list[int] = []
    for _ in range(count):
        token = next_token(np.array(entries, np.uint64), vocab_size, forbidden)
        if token in ends and len(out) < least:
            token = (token + 1) % vocab_size  # the second most probable one
            assert token not in ends
        out.append(token)
        entries.append(entry(token, len(entries), base if active is None else weights))
    return out


def invoked_at(prompt: list[int], invocation: list[int]) -> int | None:
    """Index of the last occurrence of `invocation`; None if there is none."""
    size = len(invocation)
    found = [i for i in range(len(prompt) - size + 1) if prompt[i : i + size] == invocation]
    return found[-1] if found else None


@dataclass(frozen=True, slots=True)
class OracleAdapter:
    """What `read_adapter` makes of a path."""

    digest: str
    nbytes: int
    nonfinite: bool
    virtual_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()
    merge_nbytes: int = 0
    merge_fails: bool = False
    kills: str = ""
    loses: str = ""


def kill_if(doing: str, adapter: OracleAdapter) -> None:
    """Kills this process, or loses the device, if work of this kind on the adapter does so."""
    if adapter.kills == doing:
        os.kill(os.getpid(), signal.SIGKILL)
    if adapter.loses == doing:
        raise DeviceLost("a secret of the device")


@dataclass(frozen=True, slots=True)
class OracleMerge:
    """What `merge_adapter` makes of an adapter."""

    digest: str
    nbytes: int
    adapter: OracleAdapter


@dataclass
class OracleRunner:
    """A `ModelRunner` for tests.

    Attributes:
        forbidden: token ids that the model never says by itself (such as EOS).
        nonfinite_token: a sequence that contains it gets NaN logits.
        fault_token: a batch that computes it makes `forward` raise.
        crash_token: a batch that computes it kills the process.
        hang_token: a batch that computes it takes an hour.
        lost_token: a batch that computes it loses the device, at "launch" or at "read" (`lost_at`).
        out_of_memory: number of next passes that find too little memory.
        scripts: after the marker token `m`, the sequence continues with `scripts[m]`.
        step_seconds: how long a forward pass takes at least.
        device: name of the device; the adapters' memory is the host's if it begins with "cpu".
        width: of the hidden states and of every projection of the attention.
        fingerprint, name: of the base model.
        merges_files: whether adapters that are LoRA directories can be merged.
        copy_polls: how often the engine asks in vain whether an adapter is on the device.
        max_tokens_seen, batches: what the engine asked for, for assertions.
    """

    num_blocks: int = 64
    prefix_blocks: int = 0
    block_size: int = 4
    num_slots: int = 4
    adapter_budget_bytes: int = 1000
    host_budget_bytes: int = 0
    merge_budget_bytes: int = 0
    vocab_size: int = 512
    max_context: int = 1024
    eos_token_ids: list[int] = field(default_factory=list)
    forbidden: frozenset[int] = frozenset()
    nonfinite_token: int = -1
    fault_token: int = -1
    crash_token: int = -1
    hang_token: int = -1
    lost_token: int = -1
    lost_at: str = "read"
    out_of_memory: int = 0
    scripts: dict[int, list[int]] = field(default_factory=dict)
    step_seconds: float = 0.0
    merges_files: bool = False
    copy_polls: int = 0
    tokenizer_path: str = ""
    device: str = "cpu"
    width: int = 16
    fingerprint: str = "oracle"
    name: str = "oracle"

    def __post_init__(self) -> None:
        base = base_info(
            self.fingerprint,
            architecture="LlamaForCausalLM",
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=self.width,
            qkv_bias=False,
            qk_norm=False,
        )
        self.info = ModelInfo(
            base=base,
            name=self.name,
            device=self.device,
            kernels="oracle",
            tokenizer_path=self.tokenizer_path,
            max_context=self.max_context,
            eos_token_ids=self.eos_token_ids,
        )
        shape = self.num_blocks + self.prefix_blocks, self.block_size
        self.kv = np.full(shape, EMPTY, np.uint64)
        self.kv_tokens = np.full(shape, -1, np.int64)
        self.prefixes: dict[int, list[int]] = {}
        self.merges: dict[int, OracleMerge] = {}
        self.slots: list[OracleAdapter | None] = [None] * self.num_slots
        self.batches: list[ForwardBatch] = []
        self.keep_batches = False
        self._preparing: OracleAdapter | None = None
        self._polls = 0

    # adapters

    def read_adapter(self, ref: AdapterRef) -> OracleAdapter:
        options: dict[str, Any] = {}
        size = 1
        if ref.path.startswith("{"):
            options = json.loads(ref.path)
        else:
            folder = Path(ref.path)
            if not folder.is_dir():
                raise Refusal(Reason.ADAPTER_CORRUPT, "the adapter cannot be read", "path")
            size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
            options = self._described(folder, size)
            if (folder / "oracle.json").exists():
                options |= json.loads((folder / "oracle.json").read_text())
        if "seconds" in options:
            time.sleep(options["seconds"])
        if "fail" in options:
            if options["fail"] == "crash":
                raise RuntimeError("a secret of the reader")
            if options["fail"] == "exit":
                raise SystemExit  # ends the thread that reads
            raise Refusal(options["fail"], f"made to fail: {options['fail']}", "path")
        adapter = OracleAdapter(
            files_digest(ref.digest),
            options.get("nbytes", size),
            options.get("nonfinite", False),
            options.get("virtual", 0),
            tuple(options.get("invocation", ())),
            options.get("merge_nbytes", 0),
            options.get("merge_fail", False),
            options.get("kills", ""),
            options.get("loses", ""),
        )
        kill_if("read", adapter)
        return adapter

    def _described(self, folder: Path, size: int) -> dict[str, Any]:
        """What a PEFT directory says by itself; LoRA's copies take as much as its files."""
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text()) if file.exists() else {}
        mergeable = self.merges_files and config.get("peft_type") == "LORA"
        virtual = config.get("num_virtual_tokens", 0)
        return {
            "virtual": virtual,
            "invocation": config.get("alora_invocation_tokens") or (),
            "merge_nbytes": size if mergeable else 0,
        }

    def prepare_adapter(self, adapter: OracleAdapter) -> bool:
        if adapter is not self._preparing:
            self._preparing, self._polls = adapter, 0
        self._polls += 1
        return self._polls > self.copy_polls

    def publish_adapter(self, slot: int, adapter: OracleAdapter, blocks: Sequence[int]) -> None:
        assert self.slots[slot] is None, f"slot {slot} is taken"
        assert adapter is self._preparing, "an adapter is published that was not copied"
        assert self._polls > self.copy_polls, "an adapter is published before it is copied"
        self._preparing = None
        kill_if("publish", adapter)
        self.slots[slot] = adapter
        held = sum(a.nbytes for a in self.slots if a is not None)
        assert held <= self.adapter_budget_bytes, "over the adapter budget"
        taken = [block for prefix in self.prefixes.values() for block in prefix]
        assert not set(taken) & set(blocks), "two adapters share a prefix block"
        assert all(self.num_blocks <= b < len(self.kv) for b in blocks), "not a prefix block"
        assert len(blocks) == -(-adapter.virtual_tokens // self.block_size)
        self.prefixes[slot] = list(blocks)
        weights = weights_hash([(adapter.digest, 1.0)])
        for j in range(adapter.virtual_tokens):
            at = blocks[j // self.block_size], j % self.block_size
            self.kv[at] = entry(self.vocab_size + j, j, weights)
            self.kv_tokens[at] = self.vocab_size + j

    def remove_adapter(self, slot: int) -> None:
        assert self.slots[slot] is not None, f"slot {slot} is free already"
        self.slots[slot] = None
        self.merges.pop(slot, None)
        blocks = self.prefixes.pop(slot)
        self.kv[blocks] = EMPTY
        self.kv_tokens[blocks] = -1

    def merge_adapter(self, adapter: OracleAdapter) -> OracleMerge:
        if adapter.merge_fails:
            raise RuntimeError("a secret of the merger")
        assert adapter.merge_nbytes, "there is nothing to merge"
        kill_if("merge", adapter)
        return OracleMerge(adapter.digest, adapter.merge_nbytes, adapter)

    def publish_merge(self, slot: int, merged: OracleMerge) -> None:
        adapter = self.slots[slot]
        assert adapter is not None, f"slot {slot} is free"
        assert adapter.digest == merged.digest, "the copies are another adapter's"
        assert slot not in self.merges, "merged twice"
        kill_if("publish_merge", merged.adapter)
        self.merges[slot] = merged
        assert sum(m.nbytes for m in self.merges.values()) <= self.merge_budget_bytes

    def remove_merge(self, slot: int) -> None:
        del self.merges[slot]

    # the forward pass

    def forward(self, batch: ForwardBatch, states: np.ndarray | None = None) -> np.ndarray:
        assert (states is not None) == (len(batch.state_rows) > 0)
        if self.step_seconds:
            time.sleep(self.step_seconds)
        if self.out_of_memory:
            self.out_of_memory -= 1
            raise OutOfDeviceMemory("a secret of the allocator")
        if self.lost_token in batch.tokens:
            raise DeviceLost("a secret of the device")
        if self.keep_batches:
            self.batches.append(batch)
        if self.crash_token in batch.tokens:
            os._exit(9)
        if self.hang_token in batch.tokens:
            time.sleep(3600)
        if self.fault_token in batch.tokens:
            raise RuntimeError("a secret of the device")
        logits = np.zeros((len(batch.logit_rows), self.vocab_size), np.float32)
        rows = {int(token): row for row, token in enumerate(batch.logit_rows)}
        wanted = {int(token): row for row, token in enumerate(batch.state_rows)}
        for source, target in batch.copies:
            assert source >= self.num_blocks > target, (
                "only a shared block is copied, to an own one"
            )
            self.kv[target] = self.kv[source]
            self.kv_tokens[target] = self.kv_tokens[source]
        written: set[tuple[int, int]] = set()
        for s in range(len(batch.context_lens)):
            begin, end = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
            table = batch.block_tables[s]
            pairs = range(int(batch.mix_starts[s]), int(batch.mix_starts[s + 1]))
            adapters = [
                (self.slots[batch.mix_slots[x]], float(batch.mix_weights[x])) for x in pairs
            ]
            assert all(adapter is not None for adapter, _ in adapters), "a row uses an empty slot"
            weights = weights_hash([(a.digest, w) for a, w in adapters if a is not None])
            assert end - begin >= 1
            assert batch.context_lens[s] == batch.positions[end - 1] + 1
            for t in range(begin, end):
                position = int(batch.positions[t])
                assert position == batch.positions[begin] + t - begin
                at = int(table[position // self.block_size]), position % self.block_size
                assert at not in written, "two tokens of one pass share a KV entry"
                assert at[0] < self.num_blocks, "a request writes to a shared block"
                written.add(at)
                self.kv[at] = entry(int(batch.tokens[t]), position, weights)
                self.kv_tokens[at] = batch.tokens[t]
                if t in rows or t in wanted:
                    blocks = table[: position // self.block_size + 1]
                    seen = self.kv_tokens[blocks].reshape(-1)[: position + 1]
                    entries = self.kv[blocks].reshape(-1)[: position + 1]
                    is_sound = self.nonfinite_token not in seen and not any(
                        a.nonfinite for a, _ in adapters if a
                    )
                if states is not None and t in wanted:
                    states[wanted[t]] = state_after(entries, self.width)
                    if not is_sound:
                        states[wanted[t], 3] = np.inf
                if t in rows:
                    token = self._say(seen, entries)
                    logits[rows[t], token] = 20.0
                    logits[rows[t], (token + 1) % self.vocab_size] = 18.0
                    if not is_sound:
                        logits[rows[t], 3] = np.nan
        return logits

    def _say(self, seen: np.ndarray, entries: np.ndarray) -> int:
        for marker, script in self.scripts.items():
            places = np.flatnonzero(seen == marker)
            if len(places) and len(seen) - 1 - places[-1] < len(script):
                return script[len(seen) - 1 - places[-1]]
        return next_token(entries, self.vocab_size, self.forbidden)


def build(**options: Any) -> object:
    """The factory that an engine process is started with; takes the fields of `OracleRunner`.

    With `ahead` the runner launches one pass ahead. `by_device` has options for one of several
    engines, by the name of its device.
    """
    options |= options.pop("by_device", {}).get(os.environ.get(DEVICE_VARIABLE), {})
    if "refuse" in options:
        raise Refusal(Reason(options["refuse"]), "this model cannot be served")
    if "explode" in options:
        raise RuntimeError("a secret of the loader")
    if "forbidden" in options:
        options["forbidden"] = frozenset(options["forbidden"])
    if "scripts" in options:
        options["scripts"] = {int(k): v for k, v in options["scripts"].items()}
    if not options.pop("ahead", False):
        return OracleRunner(**options)
    from engine.ahead_oracle import AheadOracle

    return AheadOracle(OracleRunner(**options))


def command(
    limits: dict[str, Any] | None = None,
    beat_seconds: float | None = None,
    core_dumps: bool = False,
    **options: Any,
) -> list[str]:
    """The command line of an engine process that runs the oracle."""
    runner = {"type": "custom", "factory": "engine.oracle:build", "options": options}
    setup: dict[str, Any] = {"runner": runner, "limits": limits or {}, "core_dumps": core_dumps}
    if beat_seconds is not None:
        setup["beat_seconds"] = beat_seconds
    config = json.dumps(setup)
    tests = str(Path(__file__).resolve().parents[1])
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1));"
        "from loraplex_server.engine.process.main import main; sys.exit(main())"
    )
    return [sys.executable, "-c", code, tests, config]
