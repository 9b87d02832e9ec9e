"""Writes the model card of an adapter: its use, its training and its evaluations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex_training.report.events import Evaluated, Event, JobEnded, Sampled
from loraplex_training.report.record import block
from loraplex_training.spec.spec import JobSpec

NOT_PEFT = ("bottleneck",)
MOST_ROWS = 12
MOST_SAMPLES = 3
MOST_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts for a model card that are in neither the job's options nor its events.

    Attributes:
        base: name of the base model.
        fingerprint: fingerprint of the base model's weights.
        parameters: number of trained parameters.
        counts: numbers of examples and tokens, by what they count.
        data: SHA-256 (hex) of the training data.
        template: SHA-256 (hex) of the chat template, or "".
        step: step of the adapter's parameters, the one with the lowest evaluation loss.
        precision: types of the products and of the base's dense tensors in training.
    """

    base: str
    fingerprint: str
    parameters: int
    counts: Mapping[str, int]
    data: str
    template: str
    step: int
    precision: str = ""


def card(job: JobSpec, facts: Facts, events: Sequence[Event]) -> str:
    """Returns the card as Markdown. `events` are the run's; the same run gives the same text."""
    own = [e for e in events if isinstance(e, Evaluated | Sampled | JobEnded) and e.job == job.name]
    evaluations = [e for e in own if isinstance(e, Evaluated)]
    samples = [e for e in own if isinstance(e, Sampled)]
    parts = [
        _head(job, facts),
        f"# {job.name}",
        f"A {job.method.name} adapter for {_code(facts.base)}, trained by Loraplex on the NF4 base "
        "model that serves it.",
        _serve(job, facts),
        _made(job, facts),
        _results(evaluations, facts.step),
        _samples(samples),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(job: JobSpec, facts: Facts) -> str:
    lines = ["library_name: peft", "pipeline_tag: text-generation"]
    lines += ["tags:", "- loraplex", f"- {job.method.name.replace('_', '-')}"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base):
        lines.insert(0, f"base_model: {facts.base}")
    return "\n".join(["---", *lines, "---"])


def _serve(job: JobSpec, facts: Facts) -> str:
    chat = " --chat" if facts.template else ""
    commands = (
        f"loraplex adapters upload {job.name} . --load\n"
        f'loraplex generate "..."{chat} --adapter {job.name}'
    )
    peft = (
        "PEFT has no adapters of this kind."
        if job.method.name in NOT_PEFT
        else 'This is a PEFT directory: `PeftModel.from_pretrained(base, ".")` loads it too.'
    )
    server = f"With a Loraplex server for that base model:\n\n```sh\n{commands}\n```"
    return f"## Use\n\n{server}\n\n{peft}"


def _made(job: JobSpec, facts: Facts) -> str:
    options = ", ".join(f"{key} {_code(str(value))}" for key, value in job.method.options.items())
    optim = job.optim
    length = f"{job.steps} steps" if job.steps else f"{job.epochs:g} epochs"
    rows = {
        "method": job.method.name + (f": {options}" if options else ""),
        "trained parameters": f"{facts.parameters:,}",
        "optimiser": f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule}",
        "length": f"{length}, {job.batch_size} x {job.accumulation} examples a step",
        "seed": str(job.seed),
        "precision": facts.precision,
        **{key: f"{count:,}" for key, count in facts.counts.items()},
        "data, SHA-256": _code(facts.data),
        "chat template, SHA-256": _code(facts.template) if facts.template else "",
        "base": _code(facts.fingerprint),
    }
    table = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *table])


def _results(evaluations: Sequence[Evaluated], best: int) -> str:
    if not evaluations:
        return ""
    has_metric = any(e.metric is not None for e in evaluations)
    lines = ["## Evaluation", ""]
    lines.append("| step | loss | perplexity |" + (" correct |" if has_metric else ""))
    lines.append("|---|---|---|" + ("---|" if has_metric else ""))
    for e in _thinned(evaluations, best):
        step = f"**{e.step}**" if e.step == best else str(e.step)
        row = f"| {step} | {e.loss:.4f} | {e.perplexity:.4g} |"
        metric = "" if e.metric is None else f"{e.metric:.1%}"
        lines.append(row + (f" {metric} |" if has_metric else ""))
    lines += ["", f"The adapter has the parameters of step {best}. Step 0 is before training."]
    return "\n".join(lines)


def _thinned(evaluations: Sequence[Evaluated], best: int) -> list[Evaluated]:
    """Returns the first, the last, the best and evenly spaced other evaluations."""
    every = -(-len(evaluations) // MOST_ROWS)
    last = len(evaluations) - 1
    return [e for i, e in enumerate(evaluations) if i % every == 0 or i == last or e.step == best]


def _samples(samples: Sequence[Sampled]) -> str:
    """Returns the answers to the same prompts before and after training."""
    if not samples:
        return ""
    parts = ["## Answers to evaluation examples"]
    for prompt in list(dict.fromkeys(s.prompt for s in samples))[:MOST_SAMPLES]:
        own = [s for s in samples if s.prompt == prompt]
        parts += ["Prompt:", block(prompt, MOST_CHARACTERS)]
        parts += ["expected:", block(own[0].reference, MOST_CHARACTERS)]
        for sample in (own[0], own[-1]) if len(own) > 1 else own:
            parts += [f"{sample.when}:", block(sample.answer, MOST_CHARACTERS)]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
