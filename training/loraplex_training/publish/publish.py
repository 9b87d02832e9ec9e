"""From a trained adapter to one that is served: written, read back, compared, registered, sent.

    1. `write`     folder beside its place: tensors, configuration, model card
    2. `verify`    the folder as the server reads it, on the server's decoder, against the trainer
    3.             the folder gets its name, whole and on the disk
    4. `register`  in a store, as a new version; aliased
    5. `send`      to a server, loaded there, and asked

Whatever fails before 3 leaves no folder, and nothing is registered or sent that was not verified.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from loraplex import Client, LoraplexError
from loraplex_adapters.convert.export.directory import staged
from loraplex_adapters.convert.export.peft_files import write_config
from loraplex_adapters.convert.export.safetensors_file import SafetensorsFile
from loraplex_adapters.format.config import FINGERPRINT_KEY
from loraplex_adapters.format.files import WEIGHTS_FILE
from loraplex_adapters.format.support import STAMP
from loraplex_adapters.store import Store
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.default_model import DEFAULT, HUB_NAME

from loraplex_training.methods.base import AdapterFiles
from loraplex_training.publish.target import Target
from loraplex_training.publish.verify import LIMITS, verify
from loraplex_training.report.card import Facts, card
from loraplex_training.report.curves import PICTURE
from loraplex_training.report.events import Published
from loraplex_training.report.record import read
from loraplex_training.run.run import Outcome, Run

FOLDER = "adapter"
CARD = "README.md"
CHECKED = 4  # examples
SAMPLE_TOKENS = 128


def publish(outcome: Outcome, run: Run, target: Target, alias: str = "") -> Published:
    """Hands a finished job's adapter over; `alias` is what points to it then, "" for nothing.

    Raises Refusal: PUBLISH_FAILED, DISK_FULL. What had been done by then is said, and stays.
    """
    base, name = run.base.weights, outcome.job
    data = run.datasets[name]
    folder = run.spec.out / name / FOLDER
    files = outcome.adapter.files()
    called = {"base_model_name_or_path": known_as(run.base.name)}
    files = replace(files, config={**files.config, **called})
    stamped = stamps(base, run.text.template_digest, data.digest)
    text = card(outcome.spec, _facts(outcome, run), list(read(run.spec.out)))
    examples = [sample.tokens for sample in (*data.evaluation, *data.train)[:CHECKED]]
    with torch.no_grad():
        trained = outcome.adapter.delta()
    with placed(folder) as fresh:
        write(fresh, files, stamped, text, getattr(torch, target.dtype))
        if (picture := run.spec.out / PICTURE).is_file():
            shutil.copyfile(picture, fresh / PICTURE)
        digest, _ = verify(
            fresh, trained, run.joint, base, examples, run.spec.cache, getattr(torch, target.dtype)
        )
    version = sample = ""
    if target.store is not None:
        version = register(folder, name, base.info, target, alias)
    if target.server:
        asked = (*data.evaluation, *data.train)[0]
        prompt = asked.tokens[: asked.prompt]
        version, sample = send(folder, name, digest, target, alias, prompt)
    return Published(name, folder, digest, version, target.server, sample)


def stamps(base: BaseWeights, template: str, data: str) -> dict[str, str]:
    """What goes into the weights file's metadata: what the adapter was made for, of and by.

    PEFT would warn about such keys in adapter_config.json. `template` and `data` are SHA-256 (hex)
    of the chat template and of the training data.
    """
    double = base.layers[0].qkv.absmax.dtype == torch.uint8
    texts = {
        "quantisation": "nf4 double 64" if double else "nf4 64",
        "template_sha256": template,
        "data_sha256": data,
        "trainer": f"loraplex {version('loraplex')}",
    }
    return {FINGERPRINT_KEY: base.fingerprint} | {
        STAMP + key: text for key, text in texts.items() if text
    }


def known_as(model: str) -> str:
    """A base's name for others: the hub's where there is one, of a path only the last part.

    What lies on this machine, and where, is nobody's business, and is no part of an adapter.
    """
    if model == DEFAULT:
        return HUB_NAME
    path = Path(model)
    return path.resolve().name if path.is_absolute() or path.exists() else model


def write(
    folder: Path,
    files: AdapterFiles,
    stamped: Mapping[str, str],
    card: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Makes the folder. The same adapter gives the same bytes. Raises OSError."""
    folder.mkdir()
    write_config(folder, files.config)
    with SafetensorsFile(folder / WEIGHTS_FILE, len(files.tensors), stamped) as out:
        for name, tensor in sorted(files.tensors.items()):
            out.add(name, tensor.to(dtype))
    (folder / CARD).write_text(card, "utf-8")


def register(folder: Path, name: str, base: BaseInfo, target: Target, alias: str) -> str:
    """Puts the adapter into the store, as a new version if the name is taken; returns "name@3".

    Raises Refusal: DISK_FULL, PUBLISH_FAILED.
    """
    assert target.store is not None
    with (
        _failing(f"{folder} is whole, but not in the store {target.store}"),
        Store(target.store, target.store_url) as store,
    ):
        record, _ = store.register(name, folder, base, LIMITS, True, target.labels)
        if alias:
            store.set_alias(alias, record.id)
        return record.id


def send(
    folder: Path, name: str, digest: str, target: Target, alias: str, prompt: Sequence[int]
) -> tuple[str, str]:
    """Uploads the adapter to a running server, loads it there and asks it.

    Returns "name@3" and the answer. Raises Refusal(PUBLISH_FAILED), also where the server's
    answer came from other bytes.
    """
    again = f"loraplex --server {target.server} adapters upload {name} {folder} --replace --load"
    try:
        with Client(target.server, wait_for_ready=False) as client:
            sent = client.upload_adapter(
                name, folder, replace=True, load=True, labels=target.labels
            ).adapter
            if alias:
                client.set_alias(alias, f"{name}@{sent.version}")
            asked = client.generate(
                token_ids=list(prompt),
                adapter=f"{name}@{sent.version}",
                temperature=0.0,
                max_new_tokens=SAMPLE_TOKENS,
            )
    except LoraplexError as error:
        raise Refusal(
            Reason.PUBLISH_FAILED,
            f"the server {target.server} did not take the adapter: {error}; it is whole in "
            f"{folder}, so send it again with: {again}",
        ) from error
    used = [adapter.digest for adapter in asked.adapters]
    if sent.digest != digest or used != [digest]:
        raise Refusal(
            Reason.PUBLISH_FAILED,
            f"the server {target.server} answered with {', '.join(used) or 'the base'}, and holds "
            f"{sent.digest}; the adapter is {digest}",
        )
    return f"{name}@{sent.version}", asked.text


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """A path beside `out` that becomes `out`, whole, when the context ends; see `staged`.

    Raises Refusal: DISK_FULL, PUBLISH_FAILED.
    """
    with _failing("nothing was registered"), staged(out, force=True) as fresh:
        yield fresh


def _facts(outcome: Outcome, run: Run) -> Facts:
    report = run.datasets[outcome.job].report
    counts = {
        "training examples": report.train.examples,
        "training tokens": report.train.tokens,
        "of these learned": report.train.learned,
        "evaluation examples": report.evaluation.examples,
    }
    parameters = sum(p.numel() for p in outcome.adapter.parameters.values())
    return Facts(
        base=known_as(run.base.name),
        fingerprint=run.base.weights.fingerprint,
        parameters=parameters,
        counts=counts,
        data=outcome.data_digest,
        template=run.text.template_digest,
        step=outcome.best_step,
    )


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turns what disks and stores say into Refusal; `what` is how things stand now."""
    try:
        yield
    except Refusal as error:
        full = error.reason is Reason.STORE_FULL or (
            isinstance(error.__cause__, OSError)
            and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
        )
        advice = "make room and resume the run, which publishes again" if full else ""
        text = f"{error.message}; {what}" + (f"; {advice}" if advice else "")
        raise Refusal(Reason.DISK_FULL if full else Reason.PUBLISH_FAILED, text) from error
