"""Examines, before the first step, the adapters that a run would publish at its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from loraplex_adapters.convert.export.directory import json_bytes
from loraplex_adapters.format.examine import examine_parsed
from loraplex_adapters.format.files import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE
from loraplex_adapters.format.header import planned_header
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_model.ops.dtypes import SAFETENSORS_NAMES

from loraplex_training.methods.base import AdapterFiles
from loraplex_training.spec.fields import refusal
from loraplex_training.step.job import Job

LIMITS = AdapterLimits(max_rank=1 << 12, max_virtual_tokens=1 << 14)
"""Limits for reading the adapter. A server with lower ones refuses it; an export is possible."""

_SMALLER = "choose a lower rank or fewer target modules"


def check(jobs: Sequence[Job], base: BaseInfo, dtype: torch.dtype = torch.float32) -> None:
    """Raises Refusal(METHOD_INVALID) with everything that publishing would fail for.

    The tensors would be saved in `dtype`. Their values and the adapter's stamps are not examined,
    since only training makes them.
    """
    problems = []
    for job in jobs:
        with torch.no_grad():
            files = job.adapter.files()
        field = f"jobs.{job.name}"
        problems += [Problem(field, text) for text in _problems(files, base, dtype)]
    if problems:
        raise refusal(Reason.METHOD_INVALID, problems)


def _problems(files: AdapterFiles, base: BaseInfo, dtype: torch.dtype) -> list[str]:
    config = json_bytes(files.config)
    # AdaLoRA lists the singular values that it keeps. They are fewer at the end, and "false" is
    # longer than "true".
    most = len(config) + config.count(b"true")
    if most > MAX_CONFIG_BYTES:
        text = f"{CONFIG_FILE} would have {most} bytes, and a server reads at most "
        return [f"{text}{MAX_CONFIG_BYTES}; {_SMALLER}"]
    kind = SAFETENSORS_NAMES[dtype]
    try:
        header, size = planned_header({n: (kind, t.shape) for n, t in files.tensors.items()})
    except Refusal as error:
        return [f"a server would refuse the adapter: {p.message}" for p in error.problems]
    if size > LIMITS.max_weights_bytes:
        text = f"{WEIGHTS_FILE} would have {size} bytes, and at most {LIMITS.max_weights_bytes}"
        return [f"{text} are accepted; {_SMALLER}, or save it in bfloat16"]
    report = examine_parsed(config, header, size, base, LIMITS)
    return [f"a server would refuse the adapter: {p.message}" for p in report.findings]
