"""Publishes a trained adapter.

    1. `write`     writes tensors, configuration and model card to a temporary directory
    2. `verify`    reads that as a server does and compares the server's decoder with the trainer
    3.             renames the directory, complete and flushed to the disk
    4. `register`  registers the adapter in a store as a new version, and aliases it
    5. `send`      uploads the adapter to a server, loads it there and generates an answer

A failure before 3 leaves no directory. Only a verified adapter is registered or uploaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from loraplex import Client, LoraplexError
from loraplex_adapters.convert.export.directory import staged, write_json
from loraplex_adapters.format.config import FINGERPRINT_KEY
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapters.format.support import STAMP
from loraplex_adapters.store import Store
from loraplex_model.base.durable import is_disk_full
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.default_model import DEFAULT, HUB_NAME
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile
from loraplex_model.ops.dtypes import BY_NAME

from loraplex_training.methods.base import AdapterFiles
from loraplex_training.publish.target import Target
from loraplex_training.publish.verify import verify
from loraplex_training.report.card import Facts, card
from loraplex_training.report.curves import PICTURE
from loraplex_training.report.events import Event, Published
from loraplex_training.report.record import read
from loraplex_training.run.preflight import LIMITS
from loraplex_training.run.run import Run
from loraplex_training.step.job import Job

FOLDER = "adapter"
CARD = "README.md"
CHECKED = 4
"""Number of examples that `verify` compares."""
SAMPLE_TOKENS = 128
"""Largest number of tokens of the answer that a server generates."""


def publish(job: Job, run: Run, target: Target, alias: str = "") -> Published:
    """Publishes a finished job's adapter; `alias` then points to it, unless it is "".

    Raises Refusal: PUBLISH_FAILED, DISK_FULL. Its message says which steps were completed; these
    are not undone.
    """
    base, name = run.base.weights, job.name
    if not run.base.file.is_intact():
        raise Refusal(
            Reason.PUBLISH_FAILED,
            "the base model's file in the cache was changed while the run used it, so what was "
            "trained may fit no base model; nothing was registered",
        )
    data = run.datasets[name]
    folder = run.spec.out / name / FOLDER
    about = described(job, run)
    examples = [sample.tokens for sample in (*data.evaluation, *data.train)[:CHECKED]]
    with torch.no_grad():
        trained = job.adapter.delta()
    with failing("nothing was registered"), staged(folder, force=True) as fresh:
        write(fresh, about.files, about.stamps, about.card(about.facts), BY_NAME[target.dtype])
        if (picture := run.spec.out / PICTURE).is_file():
            shutil.copyfile(picture, fresh / PICTURE)
        digest, _ = verify(
            fresh, trained, run.joint, base, examples, run.spec.cache, BY_NAME[target.dtype]
        )
    version = sample = ""
    if target.store is not None:
        public = base.info.named(known_as(run.base.name))
        version = register(folder, name, public, target, alias)
    if target.server:
        asked = (*data.evaluation, *data.train)[0]
        prompt = asked.tokens[: asked.prompt]
        version, sample = send(folder, name, digest, target, alias, prompt)
    return Published(name, folder, digest, version, target.server, sample)


@dataclass(frozen=True, slots=True)
class DescribedAdapter:
    """An adapter as it is now, and what its files say about it.

    Attributes:
        stamps: metadata of the weights file.
        facts: facts for the model card.
        events: the run's events until now.
    """

    job: Job
    files: AdapterFiles
    stamps: Mapping[str, str]
    facts: Facts
    events: Sequence[Event]

    def card(self, facts: Facts) -> str:
        """Returns the model card with these facts."""
        return card(self.job.spec, facts, self.events)


def described(job: Job, run: Run) -> DescribedAdapter:
    """Returns the job's adapter as it is now, under the public name of its base model."""
    files = job.adapter.files()
    called = {"base_model_name_or_path": known_as(run.base.name)}
    return DescribedAdapter(
        job,
        replace(files, config={**files.config, **called}),
        stamps(run.base.weights, run.text.template_digest, run.datasets[job.name].digest),
        _facts(job, run),
        list(read(run.spec.out)),
    )


def stamps(base: BaseWeights, template: str, data: str) -> dict[str, str]:
    """Returns the weights file's metadata: the adapter's base model, data and trainer.

    They are not in adapter_config.json, where PEFT would warn about such keys. `template` and
    `data` are SHA-256 (hex) of the chat template and of the training data.
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
    """Returns a base model's public name: its name on the hub, or the last part of a path.

    An adapter must not reveal the directories of the machine that trained it.
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
    """Writes an adapter's directory. The same adapter gives the same bytes. Raises OSError."""
    folder.mkdir()
    write_json(folder / CONFIG_FILE, files.config)
    with SafetensorsFile(folder / WEIGHTS_FILE, len(files.tensors), stamped) as out:
        for name, tensor in sorted(files.tensors.items()):
            out.add(name, tensor.to(dtype))
    (folder / CARD).write_text(card, "utf-8")


def register(folder: Path, name: str, base: BaseInfo, target: Target, alias: str) -> str:
    """Registers the adapter in the store; returns its name and version, as in "name@3".

    A name that is taken gets a new version. Raises Refusal: DISK_FULL, PUBLISH_FAILED.
    """
    assert target.store is not None
    with (
        failing(f"{folder} is complete, but not in the store {target.store}"),
        Store(target.store, target.store_url) as store,
    ):
        record, _ = store.register(name, folder, base, LIMITS, True, target.labels)
        if alias:
            store.set_alias(alias, record.id)
        return record.id


def send(
    folder: Path, name: str, digest: str, target: Target, alias: str, prompt: Sequence[int]
) -> tuple[str, str]:
    """Uploads the adapter to a running server, loads it there and generates an answer.

    Returns name and version ("name@3") and the answer. Raises Refusal(PUBLISH_FAILED), also if the
    server used an adapter of other bytes.
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
            f"the server {target.server} did not take the adapter: {error}; it is complete in "
            f"{folder}; upload it again with: {again}",
        ) from error
    used = [adapter.digest for adapter in asked.adapters]
    if sent.digest != digest or used != [digest]:
        raise Refusal(
            Reason.PUBLISH_FAILED,
            f"the server {target.server} answered with {', '.join(used) or 'the base model'} and "
            f"registered {sent.digest}; the adapter is {digest}",
        )
    return f"{name}@{sent.version}", asked.text


def _facts(job: Job, run: Run) -> Facts:
    report = run.datasets[job.name].report
    counts = {
        "training examples": report.train.examples,
        "training tokens": report.train.tokens,
        "of these learned": report.train.learned,
        "evaluation examples": report.evaluation.examples,
    }
    more = {"dropped lines": len(report.dropped), "repeated lines": report.repeated}
    counts |= {what: count for what, count in more.items() if count}
    return Facts(
        base=known_as(run.base.name),
        fingerprint=run.base.weights.fingerprint,
        parameters=job.parameters,
        counts=counts,
        data=run.datasets[job.name].digest,
        template=run.text.template_digest,
        step=job.progress.best_step,
        precision=f"products in {run.spec.products}, dense tensors in {run.spec.dtype}",
    )


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Turns refusals of disks and stores into the trainer's; `what` says what has been done."""
    try:
        yield
    except Refusal as error:
        full = error.reason is Reason.STORE_FULL or is_disk_full(error.__cause__)
        advice = "make room and resume the run, which publishes again" if full else ""
        text = f"{error.message}; {what}" + (f"; {advice}" if advice else "")
        raise Refusal(Reason.DISK_FULL if full else Reason.PUBLISH_FAILED, text) from error
