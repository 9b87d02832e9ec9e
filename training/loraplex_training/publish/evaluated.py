"""Keeps the adapters of a job as they were evaluated, each in a directory of its own.

    <out>/<name>/step-000250/       complete, or absent

These adapters have the same files as the finished one. Only the finished one is compared with the
server's decoder, since that takes about as long as an evaluation.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

from loraplex_adapters.convert.export.directory import staged

from loraplex_training.publish.publish import described, failing, write
from loraplex_training.run.run import Run
from loraplex_training.step.job import Job

_PREFIX: Final = "step-"


def keep_evaluated(run: Run, job: Job) -> Path:
    """Writes the job's adapter as it is now; removes older ones beyond the number to keep.

    Returns its directory. Raises Refusal(DISK_FULL, PUBLISH_FAILED).
    """
    place = run.spec.out / job.name
    folder = place / f"{_PREFIX}{job.progress.step:06}"
    about = described(job, run)
    facts = replace(about.facts, step=job.progress.step)
    with failing(f"the adapter of step {job.progress.step} was not kept"):
        with staged(folder, force=True) as fresh:
            write(fresh, about.files, about.stamps, about.card(facts))
        kept = sorted(path for path in place.iterdir() if path.name.startswith(_PREFIX))
        for old in kept[: -run.spec.keep_evaluated]:
            shutil.rmtree(old, ignore_errors=True)
    return folder
