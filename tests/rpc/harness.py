"""A whole server in this process over the oracle engine in its own, and what to feed it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from engine import oracle
from google.rpc import error_details_pb2, status_pb2
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc
from loraplex_model.checkpoints.tokenizer import TokenizerInfo
from loraplex_server.app import Server
from loraplex_server.config import Config
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 400
WIDTH = 16
EOS = 1

CRASH, NONFINITE, FAULT, SCRIPT = 10, 11, 12, 13
"""Token ids that make the oracle misbehave, or say what `script` was given."""

HARMLESS = {"crash_token": -1, "nonfinite_token": -1, "fault_token": -1}
"""Engine options without tokens that make the oracle misbehave, where any token may be drawn."""


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB` tokens, some of several characters, some half ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [
        "the quick brown fox jumps over the lazy dog and stops at the end",
        "déjà vu 😀😁😂 日本語",
    ]
    tokenizer.train_from_iterator(text * 50, trainer)
    missing = VOCAB - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"word{i}" for i in range(missing)])
    return tokenizer


def write_model(folder: Path) -> Path:
    """What the front needs of a base model."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    info = TokenizerInfo(
        architecture="LlamaForCausalLM",
        eos_token_ids=(EOS,),
        bos_token_id=None,
        adds_bos=False,
        chat_template="{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('the system speaks first') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
        special_tokens={"eos_token": "</s>"},
        has_tokenizer=True,
    )
    (folder / "model.json").write_text(json.dumps(dataclasses.asdict(info)))
    return folder


def write_adapter(folder: Path, seed: int = 0, rank: int = 2, **config: Any) -> Path:
    """A PEFT LoRA directory that fits the oracle's base."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "oracle",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for module in ("q_proj", "v_proj"):
        name = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{name}.lora_A.weight"] = random.normal(size=(rank, WIDTH)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = random.normal(size=(WIDTH, rank)).astype(np.float32)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


def write_prompt(folder: Path, tokens: int, seed: int = 0) -> Path:
    """A PEFT prompt-tuning directory for a base of hidden size `WIDTH`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "oracle",
        "num_virtual_tokens": tokens,
        "token_dim": WIDTH,
        "num_layers": 1,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    random = np.random.default_rng(seed)
    tensors = {"prompt_embeddings": random.normal(size=(tokens, WIDTH)).astype(np.float32)}
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


@dataclass
class Running:
    """A server that takes calls."""

    server: Server
    folder: Path
    channel: grpc.aio.Channel
    generation: Any
    adapters: Any

    async def register(self, name: str, seed: int = 0, **request: Any) -> adapter_pb2.Adapter:
        """Registers an adapter made for the purpose."""
        write_adapter(self.folder / "import" / f"{name}-{seed}", seed)
        reply = await self.adapters.RegisterAdapter(
            adapter_pb2.RegisterAdapterRequest(name=name, path=f"{name}-{seed}", **request)
        )
        return reply.adapter

    def metric(self, name: str, **labels: str) -> float:
        """The value of a sample now; 0 if there is none."""
        value = self.server.metrics.registry.get_sample_value(f"loraplex_{name}", labels)
        return value or 0.0


def config_for(folder: Path, script: list[int] | None = None, **settings: Any) -> Config:
    """Settings of a server over the oracle; `engine_options` adds to the oracle's fields."""
    options = {
        "vocab_size": VOCAB,
        "eos_token_ids": [EOS],
        "forbidden": [0, EOS, CRASH, NONFINITE, FAULT, SCRIPT],
        "crash_token": CRASH,
        "nonfinite_token": NONFINITE,
        "fault_token": FAULT,
        "scripts": {SCRIPT: script or []},
        "width": WIDTH,
        "adapter_budget_bytes": 1 << 20,
        "tokenizer_path": str(write_model(folder / "model")),
        **settings.pop("engine_options", {}),
    }
    return Config(
        **{
            "store": folder / "store",
            "import_root": folder / "import",
            "port": 0,
            "admin_port": 0,
            "engine_factory": "engine.oracle:build",
            "engine_options": options,
            **settings,
        }
    )


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[Running]:
    """A server, started and in the end closed."""
    server = Server(config_for(folder, **settings))
    try:
        await server.start()
        async with grpc.aio.insecure_channel(str(server.address)) as channel:
            yield Running(
                server,
                folder,
                channel,
                generation_pb2_grpc.GenerationServiceStub(channel),
                adapter_pb2_grpc.AdapterServiceStub(channel),
            )
    finally:
        await server.close()


def ask(
    *prompt: int, new: int = 8, adapter: str = "", **fields: Any
) -> generation_pb2.GenerateRequest:
    """A greedy request for `new` tokens."""
    stop = fields.pop("stop", {})
    return generation_pb2.GenerateRequest(
        adapter_id=adapter,
        token_ids=generation_pb2.TokenIds(ids=prompt or (20, 21, 22)),
        sampling=fields.pop("sampling", {"temperature": 0.0}),
        stop={"max_new_tokens": new, **stop},
        **fields,
    )


def streamed(request: generation_pb2.GenerateRequest) -> generation_pb2.GenerateStreamRequest:
    """The same for the streaming call."""
    return generation_pb2.GenerateStreamRequest(request=request)


FORBIDDEN = frozenset({0, EOS, CRASH, NONFINITE, FAULT, SCRIPT})


def expected(
    prompt: list[int],
    count: int,
    digest: str = "",
    mix: list[tuple[str, float]] | None = None,
    virtual: int = 0,
) -> list[int]:
    """The tokens that the oracle must say; `virtual` tokens stand before the prompt."""
    state = mix if mix is not None else [(digest, 1.0)] if digest else []
    return oracle.continuation(prompt, state, count, VOCAB, FORBIDDEN, virtual)


@dataclass(frozen=True)
class Refused:
    """A status as a client reads it."""

    code: grpc.StatusCode
    reason: str
    message: str
    details: list[Any]
    trailers: dict[str, str | bytes]

    def detail(self, kind: type) -> Any:
        """The one detail of this type."""
        (found,) = [d for d in self.details if isinstance(d, kind)]
        return found


def refusal(error: grpc.aio.AioRpcError) -> Refused:
    """Unpacks the rich status of an error."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    kinds = {
        f"google.rpc.{kind.DESCRIPTOR.name}": kind
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.ResourceInfo,
            error_details_pb2.PreconditionFailure,
            error_details_pb2.RetryInfo,
            error_details_pb2.QuotaFailure,
        )
    }
    details = []
    for packed in status.details:
        message = kinds[packed.TypeName()]()
        packed.Unpack(message)
        details.append(message)
    info = next(d for d in details if isinstance(d, error_details_pb2.ErrorInfo))
    assert info.domain == "loraplex"
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return Refused(error.code(), info.reason, status.message, details, trailers)


def series(text: str) -> dict[str, float]:
    """A scrape, sample by sample."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def slow_channel(up: Running) -> grpc.aio.Channel:
    """A channel that takes little in advance of what its user reads."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    return grpc.aio.insecure_channel(str(up.server.address), options)


async def rest(call: Any) -> list[Any]:
    """What is left of a stream that was begun with `read`; raises its error."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def until(holds: Callable[[], bool]) -> None:
    """Waits for what must come about; the test's own timeout bounds it."""
    while not holds():  # noqa: ASYNC110  (gauges have no event)
        await asyncio.sleep(0.005)
