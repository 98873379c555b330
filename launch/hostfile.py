"""``moe-train launch hostfile``: a run on machines that a hostfile names, by ssh or whatever takes a host and a
command."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from launch.hosts import UNREACHABLE, Host, check_hosts, command_on, exports, interpreter, port_of, read_hostfile
from launch.job import named_variables
from launch.script import environment
from launch.supervise import Supervisor
from moe_train.config import load_run
from moe_train.config_file import find_config
from moe_train.errors import HardwareError, UserError
from moe_train.training.preflight import check_run, completion
from parallel.spawn import REPEAT_SECONDS

SETTLE_SECONDS = 5.0
"""After the first host has failed the others may fail by themselves."""


class Hosts:
    """One start: `launch.host` on each machine, which starts that one's ranks and ends them when it is told to, or cut
    off."""

    def __init__(self, commands: dict[str, list[str]]):
        self._failed_at: float | None = None
        self._asked: float | None = None
        self._processes = {
            name: subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for name, command in commands.items()
        }

    def poll(self) -> int | None:
        statuses = {name: process.poll() for name, process in self._processes.items()}
        failed = {name: status for name, status in statuses.items() if status not in (None, 0, 3)}
        if failed and self._failed_at is None:
            self._failed_at = time.monotonic()
        if self._failed_at is not None and time.monotonic() - self._failed_at > SETTLE_SECONDS:
            self._tell("kill")
        if None in statuses.values():
            return None
        if UNREACHABLE in failed.values():
            return HardwareError.exit_code
        return next(iter(failed.values()), max(statuses.values()))

    def stop(self, number: int) -> None:
        """The first one asks the ranks to save, a later one ends them."""
        now = time.monotonic()
        self._asked = self._asked or now
        self._tell("stop" if now - self._asked < REPEAT_SECONDS else "kill")

    def _tell(self, word: str) -> None:
        for process in self._processes.values():
            if process.poll() is None and not process.stdin.closed:
                try:
                    process.stdin.write(word + "\n")
                    process.stdin.flush()
                    if word == "kill":
                        process.stdin.close()
                except OSError:
                    pass  # it has just ended


def launch(
    hostfile: str,
    run: str,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    nproc: int | None = None,
    rsh: str = "ssh",
    max_restarts: int | None = None,
) -> int:
    """Train on the first `nodes` machines of `hostfile` that are fit, until the run is over; its exit status.

    Args:
        nproc: ranks on each machine; None: as the hostfile says, else one a GPU of the cluster file.
        rsh: the command that gets a host and a command line.

    Raises:
        UserError: a mistake in the hostfile, the run or the options.
        PolicyStop: see `Supervisor.run`.
    """
    config = load_run(run, overrides)
    run_file = find_config(run, "run", Path.cwd()).resolve()
    supervisor = Supervisor(config, max_restarts, "hostfile")
    cluster, shell = supervisor.cluster, shlex.split(rsh)
    if not shell or shutil.which(shell[0]) is None:
        raise UserError(f"--rsh {rsh}: there is no such program on this machine")
    if cluster and cluster.container:
        raise UserError(
            f"{config.launch.cluster}: container: launch hostfile starts none; run it inside, or use launch slurm"
        )
    hosts = read_hostfile(hostfile, nproc or (cluster.ranks_per_node if cluster else None))
    hosts = [Host(host.name, nproc or host.ranks) for host in hosts]
    nodes = nodes or len(hosts)
    if nodes > len(hosts):
        raise UserError(f"--nodes {nodes}: {hostfile} has {len(hosts)} machines")
    check_run(config, nodes * hosts[0].ranks, "auto")
    if done := completion(config):
        print(done)
        return 0
    supervisor.hosts = nodes
    named = named_variables(run_file, overrides, config)
    setup = "\n".join(environment(cluster, named) if cluster else exports(named))

    def start(restart: int) -> Hosts:
        chosen = hosts[:nodes]
        if cluster and cluster.preflight:
            chosen = check_hosts(hosts, nodes, supervisor, restart, shell, setup)
        supervisor.where = ",".join(host.name for host in chosen)
        commands = {}
        for place, host in enumerate(chosen):
            ranks = {"first_rank": place * host.ranks, "ranks": host.ranks, "world_size": nodes * host.ranks}
            meeting = {"address": chosen[0].name, "port": port_of(supervisor, restart)}
            asked = json.dumps(
                {
                    "run": str(run_file),
                    "overrides": list(overrides),
                    "output_dir": config.output_dir,
                    **ranks,
                    **meeting,
                }
            )
            script = f"{setup}\nexec {shlex.join([interpreter(supervisor), '-m', 'launch.host', asked])}"
            commands[host.name] = command_on(host.name, shell, script)
        return Hosts(commands)

    return supervisor.run(start)
