"""Makes the queue of training jobs from the server's settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from loraplex_server.access.principals import Principal
from loraplex_server.config import Config
from loraplex_server.metrics import Metrics
from loraplex_server.registry.registry import Registry
from loraplex_server.training.delivery import RegistryDestination
from loraplex_server.training.queue import JobLimits, JobQueue
from loraplex_server.training.records import Records
from loraplex_server.training.trainer import Trainer


def job_queue(
    config: Config,
    registry: Registry,
    metrics: Metrics,
    principals: Callable[[], Mapping[str, Principal]],
) -> JobQueue:
    """The queue of training jobs, which is to be opened. The engine must have started."""
    trainer = Trainer(
        config.trainer or [sys.executable, "-m", "loraplex_training"],
        {**config.trainer_options(), "device": registry.engine.hello.model.device},
        memory=int(config.training_memory),
        threads=config.trainer_threads,
        timeout=config.training_timeout,
        lane=registry.lanes.training,
        environment=config.trainer_environment(os.environ),
    )
    return JobQueue(
        Records(config.training_jobs_dir),
        trainer,
        RegistryDestination(registry, principals),
        metrics,
        config.import_root,
        JobLimits(
            waiting=config.training_max_jobs,
            kept=config.training_keep_jobs,
            data_bytes=int(config.training_data),
            files=config.training_files,
            files_bytes=int(config.training_files_size),
        ),
    )
