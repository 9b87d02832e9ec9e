"""The fields of the server's settings, by topic; `config` checks and uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from loraplex_server.declared.named import NamedAdapter
from loraplex_server.engine.batching.fair_queue import MAX_PRIORITY

DEFAULT_MODEL: Final = "default"

Port = Annotated[int, Field(ge=0, le=65535)]
PathOrNone = Annotated[Path | None, BeforeValidator(lambda given: given or None)]  # "" is no path

PANELS: Final = {
    "model": "Model",
    "store": "Files",
    "host": "Network",
    "principals": "Access",
    "memory_limit": "Memory",
    "max_rank": "Adapters",
    "max_context": "Requests",
    "training": "Training",
    "log_format": "Logging",
}
"""Titles of the panels of `--help`, each by its first setting in the order of `Config`."""


class ServerSettings(BaseSettings):
    """The server's settings. Sizes are bytes, or text such as "512MiB"; times are seconds.

    A field's docstring is the help of its flag. Fields with `repr=False` have no flag.
    """

    model_config = SettingsConfigDict(
        env_prefix="LORAPLEX_",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    model: str = Field(DEFAULT_MODEL, min_length=1)
    """Base model: a directory, a GGUF file or a hub id of a causal language model in Hugging Face
    format. `default` is SmolLM2-135M-Instruct."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. The base's weights are NF4 in any case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. `auto` uses CUDA if it is available."""
    devices: str = ""
    """Several devices, with an engine process for each: numbers of GPUs (0,1 or cuda:0,cuda:1), or
    cpu once for each engine; if empty, there is one engine on device. Budgets of memory and
    max_running are those of each engine."""
    threads: int = Field(0, ge=0)
    """CPU threads of the engine; 0 uses all cores that the process may use. Several engines on the
    CPU divide them among each other."""
    cuda_graphs: bool = True
    """On a GPU, capture the kernel launches of decode steps at start and replay each step as
    a whole (CUDA graphs). Without effect on a CPU."""

    store: Path = Path("var/store")
    """Directory of the adapter store, which holds the registered adapters."""
    store_url: SecretStr = SecretStr("")
    """PostgreSQL URL of the store's index, needed if several servers share the store; if empty, the
    index is an SQLite file in the store."""
    cache: Path = Path("var/cache")
    """Directory for quantised base models and compiled kernels."""
    import_root: Path = Path("var/import")
    """Directory below which clients may name files of the server: adapters and training data. It
    must exist, unless it is the default or is called `import` and lies beside the store."""

    host: str = "127.0.0.1"
    """Address that the gRPC services listen on."""
    port: Port = 50051
    """Port of the gRPC services; 0 picks a free one."""
    admin_host: str = "127.0.0.1"
    """Address that the metrics endpoint (/metrics over HTTP) listens on."""
    admin_port: Port = 9464
    """Port of the metrics endpoint; 0 picks a free one."""
    insecure: bool = False
    """Allow addresses that other machines can reach although callers are not authenticated, or
    although what they send, keys included, is not encrypted."""
    public_metrics: bool = False
    """Allow an admin_host that other machines can reach. Nobody is authenticated there, and the
    metrics name adapters and principals."""
    manage_host: str = ""
    """Address for calls that change adapters, their places or training jobs, which are then refused
    on host; if empty, host serves all calls."""
    manage_port: Port = 50052
    """Port on manage_host; 0 picks a free one."""
    gateway: str = ""
    """Address (HOST:PORT) of the HTTP gateway, which speaks OpenAI's interface; port 0 picks a free
    one. It is a process of its own that starts and ends with the server; if empty, there is none.
    """
    max_connections: int = Field(1024, ge=1, le=1 << 20)
    """Most connections to the gRPC port; further ones are closed at once."""
    reflection: bool = True
    """Serve gRPC reflection."""

    principals: PathOrNone = None
    """TOML file of the principals: who may call, with which roles, adapters and limits. It is read
    again when it changes. If empty, callers are not authenticated."""
    keys: Path = Path("var/keys.json")
    """File with the hashes of the principals' keys, which `loraplex-server keys` writes."""
    jwks: PathOrNone = None
    """File with public keys (JWKS). Callers may then send a signed token (JWT) instead of a key."""
    jwt_issuer: str = ""
    """Issuer (claim iss) that a token must have; if empty, any."""
    jwt_audience: str = ""
    """Audience (claim aud) that a token must have; if empty, any."""
    tls_certificate: PathOrNone = None
    """PEM file with the server's certificate and its chain; it is read again when it changes. If
    empty, connections are not encrypted."""
    tls_key: PathOrNone = None
    """PEM file with the private key of tls_certificate."""
    tls_client_ca: PathOrNone = None
    """PEM file with the authorities of clients' certificates. Every client must then show one."""
    audit_log: PathOrNone = None
    """File to which a line of JSON is added for every call that changes something, and for every
    refused credential. If empty, these lines go to the log."""
    adapter_signatures: PathOrNone = None
    """TOML file of the policy of signatures: which keys may sign for which names. It is read again
    for every registration. If empty, adapters need no signature."""

    memory_limit: ByteSize = ByteSize(0)
    """Memory that all processes of the server may use together; near it, what would need more is
    refused, and at it new requests. 0 uses 90 % of the memory of the machine or the container."""
    gpu_memory: float = Field(0.9, gt=0, le=1)
    """Fraction of a GPU's memory that may be in use, that of other processes included. Without
    effect on a CPU."""
    kv_memory: ByteSize = ByteSize(0)
    """Memory of the KV cache; 0 uses 512 MiB on a CPU, and on a GPU what gpu_memory leaves."""
    kv_tokens: int = Field(0, ge=0)
    """Size of the KV cache in tokens; 0 sizes it by kv_memory."""
    adapter_memory: ByteSize = ByteSize(1 << 30)
    """Device memory for adapters."""
    host_adapter_memory: ByteSize = ByteSize(1 << 30)
    """Host memory for adapters that were evicted from the device or will be needed next; with 0
    they are read from disk each time."""
    merge_memory: ByteSize = ByteSize(1 << 30)
    """Device memory for the dense weights of merged adapters; with 0 no adapter can be merged."""
    virtual_tokens: int = Field(1024, ge=0, le=1 << 20)
    """KV cache tokens reserved for the virtual tokens of adapters; with 0, adapters that have
    virtual tokens are not served."""

    max_rank: int = Field(256, ge=1, le=4096)
    """Largest rank of an adapter."""
    max_adapter_file: ByteSize = Field(ByteSize(4 << 30), ge=1)
    """Largest weights file of an adapter, sent by a client or imported."""
    max_virtual_tokens: int = Field(512, ge=0, le=1 << 20)
    """Largest number of virtual tokens of one adapter, at most virtual_tokens. Above token_budget,
    loading such an adapter can make a step longer than any prompt does."""
    merge_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the dense weights of merged adapters; `auto` uses dtype."""

    adapters: tuple[NamedAdapter, ...] = Field((), repr=False)
    """Adapters that are registered when the server starts: tables [[adapters]] of the TOML file."""
    adapters_required: bool = True
    """Refuse to start if an adapter that is named at start cannot be registered."""
    adapter_directory: PathOrNone = None
    """Directory whose folders are adapters: what appears there is registered under the folder's
    name. If empty, there is none."""
    adapter_directory_seconds: float = Field(10.0, ge=0.05, le=86_400)
    """Seconds between two looks at adapter_directory. A folder is taken once nothing in it has
    changed for so long."""
    adapter_directory_removes: bool = False
    """Delete an adapter whose folder has gone from adapter_directory. It can be restored."""
    adapter_directory_labels: dict[str, str] = Field({}, repr=False)
    """Labels of all adapters of adapter_directory: a table of the TOML file."""
    adapter_directory_own_labels: tuple[str, ...] = Field((), repr=False)
    """Keys of labels that a folder of adapter_directory may set by a file loraplex-labels.json."""
    adapter_chat_templates: bool = False
    """Let clients register adapters with a chat template of their own, and render conversations
    for such an adapter with it. Templates run in a sandbox."""

    max_context: int = Field(0, ge=0)
    """Longest prompt and answer together, in tokens; 0 uses the model's context length."""
    chat_template: PathOrNone = None
    """File with a chat template (Jinja), in place of the model's. If empty, the model's is used."""
    special_tokens_in_messages: bool = False
    """Recognise control tokens that messages spell out, also in the data of training jobs, so that
    a message can end its turn and open another. By default they are text."""
    structured_output: bool = True
    """Serve structured output: completions that fit a JSON schema, an expression or a grammar."""
    max_structure: ByteSize = Field(ByteSize(64 << 10), ge=1, le=1 << 20)
    """Largest schema, expression or grammar of structured output."""
    structure_timeout: float = Field(5.0, gt=0, le=3600)
    """Seconds that the check of a schema, expression or grammar may take, in a process apart."""
    prefix_cache: bool = True
    """Keep keys and values of prompts and answers, for later requests that begin alike."""
    token_budget: int = Field(512, ge=1)
    """Most tokens in one step: decode rows and prompt chunks together."""
    prompt_step_ratio: float = Field(2.0, ge=0, le=1000)
    """How many times as long as a step that only decodes a step with prompt chunks may take. Lower
    values keep the time between tokens even, higher ones compute prompts faster; 0 sets no limit.
    """
    max_running: int = Field(64, ge=1)
    """Most requests in one step."""
    max_waiting: int = Field(256, ge=0)
    """Most requests that may wait beyond the running ones; further ones are refused."""
    max_waiting_tokens: int = Field(1 << 18, ge=1)
    """Most prompt tokens that may wait; further requests are refused."""
    max_queue_seconds: float = Field(60.0, ge=0, le=86_400)
    """Longest predicted wait with which a request is accepted; 0 accepts any."""
    fair_weights: str = ""
    """Shares of adapters while requests wait, in proportion to each other, as name=weight,...;
    `_base` is the base without an adapter, a+b a mix. Those that are not named have 1."""
    max_priority: int = Field(MAX_PRIORITY, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Highest priority of a request; a higher one counts as this."""
    adapter_turn: float = Field(30.0, ge=0, le=86_400)
    """Time that a request may keep its adapter on the device while others wait for the place; it
    then goes on when the adapter is back. 0 sets no limit."""
    stream_writes: int = Field(256, ge=0)
    """Messages per second over all streams above which tokens are sent several at a time; 0 sends
    each token at once."""
    drain_timeout: float = Field(30.0, ge=0, le=86_400)
    """Seconds that running requests have to finish after SIGTERM."""
    write_stall_timeout: float = Field(30.0, gt=0, le=86_400)
    """Seconds after which a request is ended because its client does not read the stream."""
    engine_start_timeout: float = Field(1800.0, ge=1, le=86_400)
    """Seconds that the engine may take to become ready when the server starts. A restart may take
    two minutes, or four times as long as the first start, and longer after one that was cut off."""
    engine_hang_timeout: float = Field(300.0, ge=1, le=86_400)
    """Seconds that one step of the engine may take before its process is replaced. A process
    that gives no sign of life for half a minute is replaced as well."""

    training: bool = False
    """Train adapters on request, in a process of their own."""
    training_jobs_dir: Path = Path("var/training")
    """Directory of the training jobs: data, checkpoints and records."""
    training_max_jobs: int = Field(16, ge=0)
    """Most training jobs that may wait beyond the running one; further ones are refused."""
    training_keep_jobs: int = Field(100, ge=1)
    """Number of ended training jobs to keep; older ones are removed."""
    training_memory: ByteSize = ByteSize(0)
    """Most memory that a training job may use; 0 allows all free memory."""
    training_threads: int = Field(0, ge=0)
    """CPU threads of a training job; 0 uses half of the cores."""
    training_timeout: float = Field(86_400.0, ge=0, le=31_536_000)
    """Seconds that a training job may run; 0 sets no limit."""
    training_data: ByteSize = ByteSize(256 << 20)
    """Largest data file that is accepted, uploaded or from below the import root."""
    training_files: int = Field(1000, ge=0)
    """Most uploaded data files that are kept; further ones are refused."""
    training_files_size: ByteSize = ByteSize(8 << 30)
    """Most bytes of all uploaded data files together; further ones are refused."""

    log_format: Literal["text", "json"] = "text"
    """Format of log lines: `text` for people, `json` for programs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged."""
    otlp_endpoint: str = Field("", pattern=r"^(https?://\S+)?$")
    """OpenTelemetry collector (OTLP over gRPC) to which spans of calls are sent, as a URL such as
    http://localhost:4317. If empty, calls are not traced and nothing is connected to."""
    core_dumps: bool = False
    """Let the system write core dumps if the server crashes, and let other processes of its user
    read its memory. Prompts and keys are in both."""

    engine_factory: str = Field("", repr=False, pattern=r"^([\w.]+:\w+)?$")
    """Function that builds the engine's runner in tests, as `module:name`; empty: a real model."""
    engine_options: dict[str, Any] | None = Field(None, repr=False)
    """Keyword arguments of `engine_factory`."""
    trainer: list[str] | None = Field(None, repr=False)
    """Command line that starts the trainer. Tests set their own."""
