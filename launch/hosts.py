"""Machines that are reached by a remote shell: the file that names them, commands on them, and their preflight."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.node import Settings
from launch.supervise import RunFolderProblem, Supervisor
from moe_train.errors import HardwareError, UserError

UNREACHABLE = 255
"""ssh's own status, when it is not that of the command."""
THIS = "127.0.0.1"
"""Stands for this machine where there is no remote shell."""


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it takes."""

    name: str
    ranks: int


def read_hostfile(path: str, ranks: int | None) -> list[Host]:
    """The machines of a hostfile, a line each: ``name`` or ``name slots=8`` (as DeepSpeed has it), ``node[01-12]`` for
    many, ``#`` for remarks.

    Args:
        ranks: of machines whose line has no slots; None: every line must say.

    Raises:
        UserError: one line: file, line, what is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) == 2 else None
        if len(words) > 1 and not slots:
            raise UserError(f"{path}:{number}: {line.strip()!r}: write a name, or name slots=8")
        count = int(slots[1]) if slots else ranks
        if count is None:
            raise UserError(f"{path}:{number}: {words[0]} has no slots: write {words[0]} slots=8, or give --nproc")
        for name in _expand(words[0]):
            if name in hosts:
                raise UserError(f"{path}:{number}: {name} stands there twice")
            hosts[name] = Host(name, count)
    if not hosts:
        raise UserError(f"{path} names no machine")
    if len({host.ranks for host in hosts.values()}) > 1:
        raise UserError(f"{path}: machines with different slots; a run has the same number of ranks on each")
    return list(hosts.values())


def command_on(host: str, rsh: Sequence[str], script: str) -> list[str]:
    """The command that runs lines of bash on `host`, in the folder that this process is in."""
    return [*rsh, host, shlex.join(["bash", "-c", f"cd {shlex.quote(os.getcwd())} || exit 2\n{script}"])]


def port_of(supervisor: Supervisor, restart: int) -> int:
    """A port for the rendezvous: another one for each run, process and restart."""
    return 20000 + (zlib.crc32(os.fsencode(supervisor.folder.path)) + os.getpid() * 7 + restart) % 12000


def check_hosts(
    hosts: Sequence[Host], wanted: int, supervisor: Supervisor, restart: int, rsh: Sequence[str] = (), setup: str = ""
) -> list[Host]:
    """Look at the machines as `launch.preflight` does, and return the `wanted` ones to use.

    Raises:
        HardwareError: too few are fit; the message names the others.
        RunFolderProblem: none of them can write the run's folder.
    """
    cluster, notes = supervisor.cluster, supervisor.journal.folder
    wish = cluster.preflight
    settings = Settings(
        nodes=len(hosts),
        wanted=wanted,
        ranks_per_node=hosts[0].ranks,
        gpus=hosts[0].ranks if cluster.gpus_per_node else 0,
        notes=str(notes),
        run_dir=str(supervisor.folder.path),
        disks=(cluster.scratch or "/tmp",),
        free_gigabytes=wish.free_gigabytes,
        clock_skew=wish.clock_skew,
        gigabytes_per_second=wish.gigabytes_per_second,
        timeout=wish.timeout,
    )
    names = [host.name for host in hosts]
    for name in ("good_nodes", "bad_nodes", "folder_problem"):
        (notes / name).unlink(missing_ok=True)
    processes = []
    for name in names:
        port = port_of(supervisor, restart) + 1
        variables = {
            "PREFLIGHT_NODES": ",".join(names),
            "PREFLIGHT_NODE": name,
            "MASTER_ADDR": names[0],
            "MASTER_PORT": str(port),
        }
        arguments = ["-m", "launch.preflight", settings.to_json()]
        if rsh:
            script = "\n".join(
                [setup, *exports(variables), f"exec {shlex.join([interpreter(supervisor), *arguments])}"]
            )
            processes.append(subprocess.Popen(command_on(name, rsh, script), stdin=subprocess.DEVNULL))
        else:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments], env={**os.environ, **variables}, stdin=subprocess.DEVNULL
                )
            )
    try:
        processes[0].wait(8 * settings.timeout)
    except subprocess.TimeoutExpired:
        pass
    for process in processes:  # those that hang
        process.kill()
        process.wait()
    if processes[0].returncode == UNREACHABLE and len(hosts) > wanted:  # who would have judged: the next one does
        return check_hosts(hosts[1:], wanted, supervisor, restart, rsh, setup)
    good, bad = (_names(notes / name) for name in ("good_nodes", "bad_nodes"))
    if (problem := notes / "folder_problem").exists():
        raise RunFolderProblem(f"the run's folder {problem.read_text(encoding='utf-8').strip()}")
    if not good:
        who = f"unfit: {', '.join(bad)}" if bad else "they could not be checked, or do not exchange data"
        raise HardwareError(
            f"the preflight leaves fewer than {wanted} of {len(hosts)} machines; {who}; see {notes / 'preflight.json'}"
        )
    return [host for host in hosts if host.name in good]


def exports(variables: Mapping[str, str]) -> list[str]:
    """Lines of shell that set environment variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def interpreter(supervisor: Supervisor) -> str:
    """The Python of the ranks on other machines."""
    cluster = supervisor.cluster
    if cluster is None:
        return sys.executable
    return cluster.python or ("python" if cluster.venv or cluster.modules else sys.executable)


def _names(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def _expand(pattern: str) -> list[str]:
    """``node[01-03,7]x`` -> node01x, node02x, node03x, node7x."""
    match = re.fullmatch(r"([^\[\]]*)\[([\d,-]+)\](.*)", pattern)
    if not match:
        return [pattern]
    names = []
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        names += [
            f"{match[1]}{number:0{len(first)}d}{rest}"
            for number in range(int(first), int(last or first) + 1)
            for rest in _expand(match[3])
        ]
    return names
