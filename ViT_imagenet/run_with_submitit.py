r"""Train on several GPUs and nodes of a SLURM cluster, one process per GPU, queued again until the run is done.

Behind the dashes stand the flags of ViT_imagenet.main:
python -m ViT_imagenet.run_with_submitit --nodes 2 --gpus 4 -- --config ViT_imagenet/configs/imagenet1k_tiny.yaml \
    --scale 0.1 --data-path /data/imagenet --output_dir out/run
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import yaml

from repro.config import parse_config
from repro.errors import Interrupted, UserError, run_main
from ViT_imagenet.config import Config as TrainingConfig

PROG = "ViT_imagenet.run_with_submitit"


@dataclass
class Config:
    """What to ask the cluster for."""

    nodes: int = 1
    """Machines."""
    gpus: int = 8
    """GPUs per node, with one process each; 0 means --tasks processes on CPUs."""
    tasks: int | None = None
    """Processes per node; by default one per GPU."""
    cpus: int = 10
    """Cores per process; DeiT's --num_workers 10 keeps that many busy."""
    mem_gb: int | None = None
    """Memory per node in GB; by default the cluster's."""
    time: int = 4320
    """Minutes per job; a run that is not done by then is queued again and resumes from its checkpoint."""
    partition: str | None = None
    """SLURM partition; by default the cluster's."""
    account: str | None = None
    """SLURM account to charge."""
    constraint: str | None = None
    """Features that the nodes must have."""
    signal_delay: int = 120
    """Seconds before the time limit at which the run is asked to save."""
    restarts: int = 20
    """How often a job that ran out of time is queued again."""
    wait: bool = False
    """Wait for the end; its exit code becomes this one's."""
    dry_run: bool = False
    """Print what would be asked for and started, and start nothing."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("nodes", "cpus", "time"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.gpus < 0 or self.restarts < 0 or self.signal_delay < 0:
            raise ValueError("--gpus, --restarts and --signal_delay must not be negative")
        if self.processes_per_node < 1:
            raise ValueError("--gpus 0 needs --tasks, the number of CPU processes per node")
        if self.gpus and self.tasks not in (None, self.gpus):
            raise ValueError(f"one process per GPU: --tasks {self.tasks} does not go with --gpus {self.gpus}")

    @property
    def processes_per_node(self) -> int:
        """Training processes on each node."""
        return self.tasks if self.tasks is not None else self.gpus


class Training:
    """What every process of the job runs; the job may be stopped and queued again."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self) -> int:
        """Join the other processes and train; returns the exit code."""
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        from ViT_imagenet.main import main  # torch is needed in the job, not where it is submitted

        try:
            main(self.argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Interrupted:  # saved, on all processes at the same step; now submitit's handler may queue it again
            signal.raise_signal(signal.SIGUSR2)
        return 0

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit for a job that is to be queued again: the same command resumes from its checkpoint."""
        return submitit.helpers.DelayedSubmission(Training(self.argv))


def executor_parameters(config: Config, name: str) -> dict[str, Any]:
    """The request as submitit's parameters."""
    parameters: dict[str, Any] = {
        "name": name,
        "nodes": config.nodes,
        "tasks_per_node": config.processes_per_node,
        "gpus_per_node": config.gpus,
        "cpus_per_task": config.cpus,
        "timeout_min": config.time,
    }
    if config.mem_gb is not None:
        parameters["mem_gb"] = config.mem_gb
    optional = {"partition": config.partition, "account": config.account, "constraint": config.constraint}
    parameters |= {f"slurm_{key}": value for key, value in optional.items() if value is not None}
    return parameters | {"slurm_signal_delay_s": config.signal_delay}


def main(argv: Sequence[str] | None = None) -> int:
    """Submit one run."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    config = parse_config(Config, words[:at], prog=PROG, description=str(__doc__))
    training = parse_config(TrainingConfig, words[at + 1 :], prog="behind the dashes")  # refused now, not in the queue
    folder = Path(training.output_dir)
    parameters = executor_parameters(config, folder.name)
    processes = config.nodes * config.processes_per_node
    effective = processes * training.batch_size * training.accumulate
    print(yaml.safe_dump(parameters, sort_keys=False), end="")
    print(
        f"{processes} processes, effective batch {effective}: python -m ViT_imagenet.main {' '.join(words[at + 1 :])}"
    )
    if config.dry_run:
        return 0
    if (folder / "record.json").exists():
        print(f"done already: {folder / 'record.json'}")
        return 0
    try:
        executor = submitit.AutoExecutor(folder / "submitit", cluster="slurm", slurm_max_num_timeout=config.restarts)
        executor.update_parameters(**parameters)
        job = executor.submit(Training(words[at + 1 :]))
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"nothing submitted ({error}): is SLURM's sbatch on this machine?") from error
    print(f"job {job.job_id}; log: {job.paths.stdout}")
    if config.wait:
        return max(job.results())
    return 0


if __name__ == "__main__":
    run_main(main)
