"""A real single-node SLURM on loopback, private to the test session; no accounting, so no `sacct`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sinfo", "squeue", "sbatch", "srun", "scancel", "scontrol")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs SLURM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Return as soon as `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{seconds:.0f} s went by without: {what}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def write_conf(folder: Path) -> Path:
    """slurm.conf with everything below `folder`; two partitions, of which `urgent` preempts `main`."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "plugstack.conf").touch()
    controller, daemon = free_ports(2)
    user = "root" if os.getuid() == 0 else os.environ.get("USER", str(os.getuid()))
    conf = folder / "slurm.conf"
    conf.write_text(f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
ReturnToService=2
MaxArraySize=1001
KillWait=5
MinJobAge=3600
NodeName=localhost NodeHostname={socket.gethostname().split(".")[0]} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000
PartitionName=main Nodes=localhost Default=YES MaxTime=60 State=UP DefMemPerCPU=500 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=localhost MaxTime=60 State=UP DefMemPerCPU=500 PriorityTier=10 PreemptMode=OFF
""")
    return conf


@dataclass
class Cluster:
    """The running SLURM.

    Attributes:
        folder: its configuration, state and logs.
        environment: what its clients need.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def ask(self, *command: str) -> str:
        """Output of one SLURM command."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> dict[str, str]:
        """Number → state of all jobs that the controller remembers."""
        lines = self.ask("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T").splitlines()
        return dict(line.split("|", 1) for line in lines)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """SLURM, started once for the session; skips where it is not installed."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no SLURM here ({', '.join(missing)} missing): scripts/install_slurm.sh installs it, as root")
    folder = tmp_path_factory.mktemp("slurm")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))}
    environment["SLURM_CONF"] = str(write_conf(folder))
    found = Cluster(folder, environment)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "localhost"]):
            with open(folder / f"{command[0]}.out", "wb") as out:
                daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
        wait_for(lambda: _idle(found), 30, f"an idle node (logs in {folder})")
        yield found
        found.ask("scancel", "--user", str(os.getuid()))
        wait_for(lambda: not found.ask("squeue", "--noheader"), 30, "an empty queue")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle(cluster: Cluster) -> bool:
    asked = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=cluster.environment, capture_output=True, text=True, timeout=30
    )
    return set(asked.stdout.split()) == {"idle"}


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object], float, str], None]:
    """`wait_for`, for the tests."""
    return wait_for
