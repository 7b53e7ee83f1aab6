"""A Hydra launcher that runs the jobs of a sweep together, so that they share prefills."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kvbench.sweep import run_jobs


class SharedPrefillLauncher(Launcher):
    """Jobs of the same model, task and mode are one group: each sample is prefilled once for all their stacks."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        loader = self.context.config_loader
        configs = [loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        run_jobs(configs)
        returns = []
        for overrides, config in zip(job_overrides, configs, strict=True):
            job = JobReturn(overrides=overrides, cfg=config, status=JobStatus.COMPLETED)
            job.return_value = None
            returns.append(job)
        return returns
