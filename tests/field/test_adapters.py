"""Adapter directories of other tools and of careless copies: taken, or refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loraplex import Client

from field.adapters import PREFIX, Tensors, config, down, random, write
from field.bases import FEED_FORWARD, HIDDEN, LAYERS, VOCAB, TinyBase, command, serving

BASE = TinyBase()
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"


@pytest.fixture
def client() -> Any:
    """A client of a server on the tiny base."""
    with Client(serving(BASE).address) as opened:
        yield opened


def findings(folder: Path) -> str:
    """The lines by which the command line refuses a local directory; "" if it takes it."""
    words = ("adapters", "validate", "--local", folder, "-s", serving(BASE).address)
    done = command("loraplex", *words)
    assert "Traceback" not in done.text
    return "" if done.code == 0 else done.text


def taken(folder: Path) -> None:
    assert findings(folder) == ""


def test_both_names_of_saved_embeddings(tmp_path: Path) -> None:
    rows, saved = random(VOCAB, HIDDEN), config(modules_to_save=["embed_tokens"])
    names = [f"{EMBEDDING}.weight", f"{EMBEDDING}.modules_to_save.weight"]
    taken(write(tmp_path / "same", saved, down() | dict.fromkeys(names, rows)))
    twins = down() | {names[0]: rows, names[1]: random(VOCAB, HIDDEN, seed=2)}
    assert "modules_to_save.weight" in findings(write(tmp_path / "unequal", saved, twins))


def test_embeddings_saved_without_the_option(tmp_path: Path) -> None:
    for name, rows in ((f"{EMBEDDING}.weight", VOCAB), (f"{HEAD}.weight", VOCAB)):
        folder = write(tmp_path / name, config(), down() | {name: random(rows, HIDDEN)})
        taken(folder)


def test_vocabulary_of_another_size_is_named(tmp_path: Path) -> None:
    saved = config(modules_to_save=["embed_tokens", "lm_head"])
    for rows in (VOCAB + 64, VOCAB - 64):
        grown = {f"{name}.weight": random(rows, HIDDEN) for name in (EMBEDDING, HEAD)}
        text = findings(write(tmp_path / str(rows), saved, down() | grown))
        assert "BASE_MODEL_MISMATCH" in text
        assert "vocabulary" in text
        assert str(VOCAB) in text


def test_copy_of_the_base_that_differs(tmp_path: Path, client: Client) -> None:
    head = {f"{HEAD}.lora_A.weight": random(2, HIDDEN), f"{HEAD}.lora_B.weight": random(VOCAB, 2)}
    layers = down(0) | down(1)
    names = config(target_modules=["down_proj", "lm_head"], layers_to_transform=None)
    copy = {f"{HEAD}.base_layer.weight": random(VOCAB, HIDDEN, seed=3)}
    folder = write(tmp_path, names, layers | head | copy)
    words = ("adapters", "upload", "copy", folder, "-s", serving(BASE).address)
    done = command("loraplex", *words)
    assert "base_layer" in done.text


def test_magnitudes_of_dora_under_either_name(tmp_path: Path) -> None:
    at = f"{PREFIX}model.layers.0.mlp.down_proj.lora_magnitude_vector"
    for ending in ("", ".weight"):
        magnitudes = {at + ending: np.ones(HIDDEN, np.float16)}
        taken(write(tmp_path / f"dora{ending}", config(use_dora=True), down() | magnitudes))


def test_expressions_in_the_configuration(tmp_path: Path) -> None:
    key = r".*\.layers\.1\..*(down_proj|up_proj)$"
    changes = {"rank_pattern": {key: 8}, "alpha_pattern": {key: 64}, "layers_to_transform": None}
    taken(write(tmp_path / "ranks", config(**changes), down(0) | down(1, 8)))
    targets = config(target_modules=r".*\.mlp\.down_proj", layers_to_transform=None)
    taken(write(tmp_path / "targets", targets, down(0) | down(1)))
    for excluded in (".*(vision_tower|audio_tower).*", ["*vision_tower*"]):
        folder = tmp_path / f"excluded-{type(excluded).__name__}"
        taken(write(folder, config(exclude_modules=excluded), down()))


def test_expression_outside_the_grammar_is_refused_by_name(tmp_path: Path) -> None:
    hostile = config(rank_pattern={r"(?<=(a+)+)q_proj": 8})
    text = findings(write(tmp_path, hostile, down()))
    assert "rank_pattern" in text
    assert "ADAPTER_UNSUPPORTED" in text


def test_options_of_a_trainer_have_no_effect(tmp_path: Path) -> None:
    changes = {"runtime_config": {"ephemeral_gpu_offload": False}, "lora_dropout": 0.1}
    taken(write(tmp_path, config(**changes), down()))


def test_long_configuration_of_adalora(tmp_path: Path) -> None:
    paths = [f"model.layers.{n}.mlp.{name}" for n in range(LAYERS) for name in ("down_proj",)]
    at = f"{PREFIX}{paths[0]}"
    tensors = {
        f"{at}.lora_A": random(1, FEED_FORWARD),
        f"{at}.lora_B": random(HIDDEN, 1),
        f"{at}.lora_E": random(1, 1),
        f"{PREFIX}{paths[1]}.lora_A": random(0, FEED_FORWARD),
        f"{PREFIX}{paths[1]}.lora_B": random(HIDDEN, 0),
        f"{PREFIX}{paths[1]}.lora_E": random(0, 1),
    }
    pattern = {f"{path}.lora_E": [n == 0] + [False] * 9000 for n, path in enumerate(paths)}
    settings = config(
        **{"peft_type": "ADALORA", "init_r": 9001, "target_r": 8, "layers_to_transform": None},
        rank_pattern=pattern,
    )
    assert len(json.dumps(settings)) > 64 << 10
    text = findings(write(tmp_path, settings, tensors))
    assert "config_size" not in text
    assert "64" not in text or "RANK_TOO_LARGE" in text


def test_links_of_a_hub_cache(tmp_path: Path, client: Client) -> None:
    plain = write(tmp_path, config(), down())
    root = serving(BASE).import_root / "models--acme--support"
    snapshot, blobs = root / "snapshots" / "0123abcd", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        (blobs / f"{number:064x}").write_bytes((plain / file).read_bytes())
        (snapshot / file).symlink_to(f"../../blobs/{number:064x}")
    path = "models--acme--support/snapshots/0123abcd"
    assert client.validate_adapter(path).valid
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to("/etc/hostname")
    refused = client.validate_adapter(path)
    assert not refused.valid
    assert "link" in refused.findings[0].message


FOREIGN: dict[str, tuple[Tensors, str]] = {
    "compiled": (down(prefix=f"_orig_mod.{PREFIX}"), "_orig_mod"),
    "adapter-name": (down(a="lora_A.default.weight", b="lora_B.default.weight"), "default"),
    "no-prefix": (down(prefix=""), PREFIX),
    "multimodal": (down(stem="model.language_model.layers"), "language_model"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_names_are_refused_once_and_can_be_converted(tmp_path: Path, kind: str) -> None:
    tensors, named = FOREIGN[kind]
    folder = write(tmp_path / "adapter", config(), tensors)
    text = findings(folder)
    if not text:
        return  # taken as it is
    assert named in text
    assert len(text.splitlines()) <= 3
    words = ("store", "import", folder, "--name", "converted", "--convert")
    model = ("--model", BASE.folder())
    done = command("loraplex-server", *words, "--store", tmp_path / "store", *model)
    assert done.code == 0, done.text


def test_weights_of_other_tools_are_called_what_they_are(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.down_proj"
    mlx = {f"{at}.lora_a": random(FEED_FORWARD, 2), f"{at}.lora_b": random(2, HIDDEN)}
    settings = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2}}
    assert "MLX" in findings(write(tmp_path / "mlx", settings, mlx, "adapters.safetensors"))
    names = ("layers.0.feed_forward.w2.lora_A.weight", "layers.0.feed_forward.w2.lora_B.weight")
    mistral = {names[0]: random(2, FEED_FORWARD), names[1]: random(HIDDEN, 2)}
    text = findings(write(tmp_path / "mistral", None, mistral, "lora.safetensors"))
    assert "mistral" in text.lower()


def test_files_that_are_no_adapter_are_called_what_they_are(tmp_path: Path) -> None:
    pointer = write(tmp_path / "pointer", config(), down()) / "adapter_model.safetensors"
    pointer.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 26184\n"
    )
    assert "LFS" in findings(pointer.parent)
    write(tmp_path / "run" / "support", config(), down())
    assert "support" in findings(tmp_path / "run")
    pickle = write(tmp_path / "pickle", config(), down())
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    assert "safetensors" in findings(pickle)
    model = tmp_path / "model"
    model.mkdir()
    for file in ("config.json", "model.safetensors"):
        (model / file).write_bytes((BASE.folder() / file).read_bytes())
    assert "model" in findings(model).lower()


def test_many_faults_have_a_reason_and_one_cause(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer in range(40):
        tensors |= down(layer, prefix=f"_orig_mod.{PREFIX}")
    folder = write(tmp_path, config(layers_to_transform=None), tensors)
    words = ("adapters", "upload", "many", folder, "-s", serving(BASE).address)
    done = command("loraplex", *words)
    assert done.code != 0
    assert "ADAPTER_INVALID" in done.text or "ADAPTER_UNSUPPORTED" in done.text
    assert "_orig_mod" in done.text


@pytest.mark.parametrize("name", ["Support_v1.2", "acme/support", "orders_v2"])
def test_wrong_name_comes_back_with_a_right_one(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, config(), down())
    done = command("loraplex", "adapters", "upload", name, folder, "-s", serving(BASE).address)
    wanted = {"Support_v1.2": "support-v1-2", "acme/support": "acme-support"}
    assert wanted.get(name, "orders-v2") in done.text


def test_mistyped_import_root_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "improt"
    words = ("--port", "0", "--admin-port", "0", "--store", tmp_path / "store")
    done = command(
        *("loraplex-server", "serve", "--model", BASE.folder(), "--import-root", missing, *words)
    )
    assert done.code != 0
    assert "improt" in done.text
    assert not missing.exists()


def test_template_of_an_adapter(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", config(), down())
    template = folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}")
    address = serving(BASE).address
    words = ("loraplex", "adapters", "upload", "own-template", folder, "-s")
    told = command(*words, address)
    assert told.code == 0
    assert "chat_template.jinja is not used" in told.text
    refused = command(*words, address, "--replace", "--chat-template", template)
    assert "--adapter-chat-templates" in refused.text
    allowing = serving(BASE, "--adapter-chat-templates").address
    assert command(*words, allowing, "--chat-template", template).code == 0
    with Client(allowing) as client:
        messages = [{"role": "user", "content": "hi"}]
        assert client.render_chat(messages, adapter="own-template").text == "[INST]hi[/INST]"
        assert client.render_chat(messages).text.startswith("<|im_start|>user")


def test_template_of_the_operator(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    base = TinyBase(template="")
    with Client(serving(base, "--chat-template", str(template)).address) as client:
        assert client.render_chat([{"role": "user", "content": "hi"}]).text == "<hi>"


def test_end_tokens_of_an_adapter(tmp_path: Path, client: Client) -> None:
    folder = write(tmp_path, config(), down())
    client.upload_adapter("ends", folder, eos_token_ids=[9])
    options = {"temperature": 0, "logit_bias": {9: 100.0}, "max_new_tokens": 4}
    stop = client.generate("abc", adapter="ends", **options).matched_stop
    assert stop is not None
    assert stop.token_id == 9
    assert client.generate("abc", **options).finish_reason.value == "length"
