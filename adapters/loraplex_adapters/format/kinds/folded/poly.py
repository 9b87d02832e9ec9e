"""POLY: y += B A x / r, where A and B are mixtures of `n_skills` factors, for one task of the file.

The weights of a mixture belong to a task and a split of the module's widths, and are constants.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.folded.base import (
    ENDINGS,
    EXCLUDED_OPTION,
    TARGET_OPTIONS,
    FoldedReading,
    Size,
    folded,
    measured,
    shape_of,
    states,
)
from loraplex_adapters.format.kinds.multitask import TASK, of_task, read_task
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import served

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


@dataclass(frozen=True, slots=True)
class Skills:
    """Poly's factors of each module, and the task whose mixture is served."""

    r: int
    tasks: int
    skills: int
    splits: int
    task: int
    marks: Collection[str] = (_A, _B, _LOGITS)

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose factors have the configured rank and numbers."""
        file.check_rank("r", self.r)
        found = []
        for site in adapted:
            fan_in, fan_out = shape_of(file, site)
            tensors = {role: file.require(site, role) for role in self.marks}
            if fan_in % self.splits or fan_out % self.splits:
                message = f"n_splits is {self.splits}, which does not divide the widths of "
                message += f"{file.path(site)}, {fan_in} and {fan_out}"
                file.find(Reason.BASE_MODEL_MISMATCH, message, "n_splits")
                continue
            shapes: dict[str, tuple[Size, ...]] = {
                _A: ("splits", "skills", fan_in // self.splits, "r"),
                _B: ("splits", "skills", "r", fan_out // self.splits),
                _LOGITS: ("tasks", "weights"),
            }
            held = measured(file, site, tensors, shapes)
            if held is None:
                continue
            stated = {
                "r": (self.r, "r"),
                "splits": (self.splits, "n_splits"),
                "skills": (self.skills, "n_skills"),
                "tasks": (self.tasks, "n_tasks"),
                "weights": (self.splits * self.skills, "n_skills"),
            }
            checks = [states(file, site, held[n], *of, n) for n, of in stated.items()]
            logits = tensors[_LOGITS]
            if all(checks) and logits is not None:
                every = {**tensors, _LOGITS: of_task(logits, self.task)}
                found += folded(file, site, "poly", every, self.r, scale=1.0 / self.r)
        return found


def _read(reader: Reader) -> FoldedReading | None:
    targets = reader.targets()
    reader.choice("poly_type", {"poly": None}, None)
    numbers = [reader.integer(key) for key in ("r", "n_tasks", "n_skills", "n_splits")]
    rank, tasks, skills, splits = numbers
    if rank is None or tasks is None or skills is None or splits is None:
        return None
    task = read_task(reader, "n_tasks", tasks)
    return (
        None if task is None else FoldedReading(targets, Skills(rank, tasks, skills, splits, task))
    )


POLY = Kind(
    peft_type="POLY",
    summary=f"Poly: mixtures of LoRA for one task, which the key `{TASK}` names",
    options={
        **{k: v for k, v in TARGET_OPTIONS.items() if not k.startswith("layers")},
        **EXCLUDED_OPTION,
        "n_skills": served(),
        "n_splits": served(),
        "n_tasks": served(f"more than 1 needs `{TASK}`"),
        "poly_type": served("poly"),
        "r": served("scale is 1 / r"),
    },
    endings={**dict.fromkeys((_A, _B, _LOGITS), ""), **ENDINGS},
    read=_read,
)
