"""A real Slurm on this machine: one controller and N nodes that are processes, from Debian's packages, without systemd.

Every slurmd runs in a UTS and mount namespace of its own, so that a job sees hosts node1, node2, ...; the namespace
also tells the processes of a node, which is how one loses power. Nothing of the machine's own configuration is touched.
Needs root.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


class Unavailable(Exception):
    """There can be no Slurm here; the message says why."""


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def install() -> None:
    """Bring Debian's packages, where they are not there yet. Raises Unavailable.

    Only where it is asked for: it installs packages on the machine.
    """
    if not os.environ.get("TEST_ON_SLURM"):
        raise Unavailable("set TEST_ON_SLURM=1 (as root on Debian) to have the tests bring up a Slurm of virtual nodes")
    if os.geteuid() != 0:
        raise Unavailable("a Slurm of virtual nodes needs root")
    if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode:
        raise Unavailable("this machine permits no mount and UTS namespaces")
    if all(shutil.which(program, path=_path()) for program in PROGRAMS):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable("Slurm is not installed and there is no apt-get")
    policy = Path("/usr/sbin/policy-rc.d")  # the packages' own services must not start
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        patience = ["-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]
        for command in (
            ["apt-get", *patience, "update", "-qq"],
            ["apt-get", *patience, "install", "-y", "-q", "--no-install-recommends", *PACKAGES],
        ):
            done = subprocess.run(
                command,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
                timeout=150,
            )
            if done.returncode:
                raise Unavailable(f"apt-get failed: {done.stderr.strip().splitlines()[-1:]}")
    except subprocess.TimeoutExpired:
        raise Unavailable("Debian's packages could not be fetched in time") from None
    finally:
        if made:
            policy.unlink()


class SlurmCluster:
    """A controller and `nodes` virtual nodes that claim 192 CPUs and 8 H100 each. A context manager.

    Partition `gpu` has all nodes, `low` as well and gives way to it, `last` has the last three.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: UNIX sockets lie below
        self.conf = self.folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": _path()}

    def __enter__(self) -> SlurmCluster:
        try:
            self._configure()
            self._munged()
            self._daemon(["slurmctld"])
            for number in range(1, self.nodes + 1):
                self.start_node(f"node{number}")
            self.wait(
                lambda: self.call("sinfo", "-h", "-N", "-p", "gpu", "-o", "%T").count("idle") == self.nodes,
                60,
                "idle nodes",
            )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Run one of Slurm's commands; its stdout."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def wait(self, condition: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
        """Poll until `condition()`; an AssertionError that names `what` after `seconds`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                f"waited {seconds:.0f} s in vain for {what if isinstance(what, str) else what()}"
            )
            time.sleep(0.2)

    def start_node(self, name: str, *flags: str) -> None:
        """Start a node's slurmd; ``-b`` tells the controller that the node has rebooted."""
        script = (
            'hostname "$1"; mount --bind "$2" /etc/hosts; readlink /proc/self/ns/uts > "$3"; shift 3; exec slurmd "$@"'
        )
        space = self.folder / f"{name}.uts"
        self._daemon(
            [
                "unshare",
                "--mount",
                "--uts",
                "bash",
                "-euc",
                script,
                "-",
                name,
                str(self.folder / "hosts"),
                str(space),
                *flags,
                "-N",
                name,
            ]
        )

    def slurmd(self, name: str) -> int:
        """The process id of a node's slurmd."""
        return int((self.folder / f"slurmd.{name}.pid").read_text())

    def kill_slurmd(self, name: str) -> None:
        """End a node's slurmd alone: what runs there goes on, and nobody can end it from outside. `start_node` brings
        it back."""
        pid = self.slurmd(name)
        os.kill(pid, signal.SIGKILL)
        self.wait(lambda: not _alive(Path(f"/proc/{pid}")), 30, f"the end of {name}'s slurmd")

    def fill_disk(self, name: str, folder: Path) -> None:
        """Put a disk of 64 KB at `folder`, which only the processes of this node see."""
        inside = ["nsenter", f"--mount=/proc/{self.slurmd(name)}/ns/mnt"]
        done = subprocess.run(
            [*inside, "mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def resume(self) -> None:
        """Take back the nodes that the controller holds for down, whose slurmd answers."""

        def back() -> bool:
            # Again and again: one that answers only now is held for down afresh.
            self.call("scontrol", "update", f"nodename=node[1-{self.nodes}]", "state=resume", check=False)
            return not self.call("sinfo", "-h", "-N", "-t", "down,drain,fail,no_respond", "-o", "%N")

        self.wait(back, 240, "every node")

    def power_off(self, name: str) -> None:
        """Kill everything that runs on a node, at once."""
        space = (self.folder / f"{name}.uts").read_text().strip()
        assert space and space != os.readlink("/proc/self/ns/uts")
        for _ in range(50):
            found = [
                int(path.name)
                for path in Path("/proc").glob("[0-9]*")
                if _alive(path) and _link(path / "ns/uts") == space
            ]
            if not found:
                return
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)

    def close(self) -> None:
        """End all jobs and daemons, by their own process ids, and remove the folder."""
        subprocess.run(
            ["scancel", "--full", "--signal=KILL", "--state=RUNNING", "--me"],
            env=self.environment,
            capture_output=True,
            timeout=30,
        )
        subprocess.run(["scancel", "--me"], env=self.environment, capture_output=True, timeout=30)
        for path in self.folder.glob("*.uts"):
            self.power_off(path.stem)
        for name in ("slurmctld", "munged"):
            try:
                pid = int((self.folder / f"{name}.pid").read_text())
                if name in (_link(Path(f"/proc/{pid}/exe")) or ""):
                    os.kill(pid, signal.SIGKILL)
            except (OSError, ValueError):
                pass
        shutil.rmtree(self.folder, ignore_errors=True)

    def _daemon(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, f"{command[0]}: {done.stderr}"

    def _munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "seed",
        }
        self._daemon(["munged", *(f"--{option}={self.folder / name}" for option, name in files.items())])

    def _configure(self) -> None:
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        folder.chmod(0o755)
        for name in ("state", "dev", *(f"spool/node{number}" for number in range(1, self.nodes + 1))):
            (folder / name).mkdir(parents=True)
        for number in range(8):  # NVIDIA's major number: with no driver behind it an open fails, as it should
            subprocess.run(
                ["mknod", "-m", "666", folder / f"dev/nvidia{number}", "c", "195", str(number)], capture_output=True
            )
        names = "".join(f"127.0.0.1 node{number}\n" for number in range(1, self.nodes + 1))
        (folder / "hosts").write_text(f"127.0.0.1 localhost {host}\n{names}")
        (folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=node[1-{self.nodes}] Name=gpu Type=h100 File={folder}/dev/nvidia[0-7]\n"
        )
        ports = _free_ports(self.nodes + 1)
        # Where this machine's name is 127.0.0.1 everything listens there alone; elsewhere srun would not be found if it
        # did.
        try:
            local = socket.gethostbyname(host) == "127.0.0.1"
        except OSError:
            local = False
        nodes = "".join(
            f"NodeName=node{number} NodeAddr=127.0.0.1 Port={ports[number]} Sockets=2 CoresPerSocket=48 "
            "ThreadsPerCore=2 RealMemory=2000000 Gres=gpu:h100:8 State=UNKNOWN\n"
            for number in range(1, self.nodes + 1)
        )
        self.conf.write_text(
            _CONF.format(folder=folder, host=host, port=ports[0])
            + ("CommunicationParameters=NoCtldInAddrAny,NoInAddrAny\n" if local else "")
            + nodes
            + "PartitionName=DEFAULT MaxTime=7-0 DefMemPerCPU=1000 PriorityTier=10 PreemptMode=OFF\n"
            + f"PartitionName=gpu Nodes=node[1-{self.nodes}] Default=YES\n"
            + f"PartitionName=last Nodes=node[{self.nodes - 2}-{self.nodes}]\n"
            + f"PartitionName=low Nodes=node[1-{self.nodes}] PriorityTier=1 PreemptMode=REQUEUE GraceTime=10\n"
        )


# A short life of credentials is what lets a requeued job start again after 6 s instead of 2 minutes.
_CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,bf_window=1440
PriorityType=priority/basic
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=1
SlurmctldTimeout=30
SlurmdTimeout=15
InactiveLimit=0
KillWait=5
MinJobAge=3600
AccountingStorageType=accounting_storage/none
GresTypes=gpu
"""


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has, below the range from which the kernel gives some to anybody who connects."""
    found: list[int] = []
    for port in random.sample(range(11000, 19000), 2000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            return found
    raise Unavailable("this machine has no free ports")


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _alive(process: Path) -> bool:
    """A zombie has no program any more."""
    return _link(process / "exe") is not None
