"""MULTITASK_PROMPT_TUNING: virtual tokens P * (C[task] R[task]), for one task of the file.

P [n, hidden] is shared by all tasks; C [n, ranks] and R [ranks, hidden] belong to one. PEFT takes
the task with every call. Here an adapter serves one task, which its configuration names, so that a
request names nothing but an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.header import ITEM_SIZE
from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.virtual import (
    PROMPT_OPTIONS,
    TENSOR,
    VirtualReading,
    read_virtual,
)
from loraplex_adapters.format.modules import VIRTUAL_TOKENS
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec, TensorLocation
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.support import STAMP, ignored, served

TASK = f"{STAMP}task"
"""Key of the task that is served, from 0; a file with one task needs none."""

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


@dataclass(frozen=True, slots=True)
class MultitaskReading:
    """The options of a MULTITASK_PROMPT_TUNING configuration.

    Attributes:
        prompt: the shared virtual tokens.
        tasks, ranks: numbers of tasks, and of ranks of each task's factors.
        task: the task that is served.
    """

    prompt: VirtualReading
    tasks: int
    ranks: int
    task: int

    def place(self, file: Placement) -> list[ModuleSpec]:
        """The shared tokens with the factors of one task."""
        file.check_rank("num_ranks", self.ranks)
        placed = self.prompt.place(file)
        hidden = file.base.config.hidden_size
        columns = self._of_task(file, _COLUMNS, (self.prompt.count, self.ranks))
        rows = self._of_task(file, _ROWS, (self.ranks, hidden))
        if columns is None or rows is None:
            return []
        factors = {"task_cols": columns, "task_rows": rows}
        return [replace(m, tensors={**m.tensors, **factors}) for m in placed]

    def _of_task(self, file: Placement, name: str, shape: tuple[int, int]) -> TensorLocation | None:
        """The part of a tensor that belongs to the task; None, with a finding, if it is unfit."""
        tensor = file.require(VIRTUAL_TOKENS, name)
        if tensor is None:
            return None
        if tensor.shape != (self.tasks, *shape):
            message = f"{shown(name)} has shape {list(tensor.shape)}; num_tasks, num_ranks and "
            message += f"num_virtual_tokens need {[self.tasks, *shape]}"
            file.find(Reason.ADAPTER_INVALID, message, shown(name))
            return None
        return of_task(tensor, self.task)


def read_task(reader: Reader, key: str, tasks: int) -> int | None:
    """The task that is served, of `tasks`, whose number is under `key`; None with a finding."""
    task = reader.config.get(TASK)
    if task is None and tasks == 1:
        return 0
    if task is None:
        reader.unsupported(
            key,
            f"is {tasks}, and an adapter serves one task: add the key {TASK} with the number of "
            f"the task, 0 to {tasks - 1}, and register the files once for each task",
        )
    elif type(task) is int and 0 <= task < tasks:
        return task
    else:
        reader.invalid(TASK, f"is not the number of a task, 0 to {tasks - 1}")
    return None


def of_task(tensor: TensorLocation, task: int) -> TensorLocation:
    """The part of a tensor [tasks, ...] that belongs to a task."""
    shape = tensor.shape[1:]
    size = prod(shape) * ITEM_SIZE[tensor.dtype]
    start = tensor.start + task * size
    return replace(tensor, shape=shape, start=start, end=start + size)


def _read(reader: Reader) -> MultitaskReading | None:
    prompt = read_virtual(reader, "prompt")
    # PEFT's default is 1 for both, as the class of the configuration states.
    tasks = 1 if reader.config.get("num_tasks") is None else reader.integer("num_tasks")
    ranks = 1 if reader.config.get("num_ranks") is None else reader.integer("num_ranks")
    if prompt is None or tasks is None or ranks is None:
        return None
    task = read_task(reader, "num_tasks", tasks)
    return None if task is None else MultitaskReading(prompt, tasks, ranks, task)


MULTITASK_PROMPT_TUNING = Kind(
    peft_type="MULTITASK_PROMPT_TUNING",
    summary=f"virtual tokens of one task, which the key `{TASK}` names",
    options={
        **PROMPT_OPTIONS,
        "num_ranks": served(),
        "num_tasks": served(f"more than 1 needs `{TASK}`"),
        "prompt_tuning_init_state_dict_path": ignored("never opened"),
        "prompt_tuning_init_task": ignored("the task of an initialisation"),
    },
    endings={TENSOR: "", _COLUMNS: "", _ROWS: ""},
    read=_read,
    whole_names=True,
)
