"""Are the nodes of a job fit for it? Asked on each of them before every start.

    MASTER_ADDR=node1 MASTER_PORT=20000 PREFLIGHT_NODES=node1,node2 srun --ntasks-per-node=1 python -m launch.preflight
    SETTINGS

One task a node looks at its own machine (`launch.node`) and reports to the first node, over plain sockets: a node that
is broken, hangs or never comes must not take the judgement with it. The first node compares the clocks, has all fit
nodes exchange data (`parallel.fabric`), and where that fails or is slow has pairs of neighbours do so, which shows
whose fault it is. The verdict lies in the notes of the run's launcher:

    preflight.json      everything that was found
    bad_nodes           names, one a line: to be left out
    good_nodes          names, one a line: to be used (`wanted` of them); only where there are enough and they exchange
                        data
    folder_problem      what is wrong with the run's folder, where all nodes find it so: no node's fault
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.node import Report, Settings, check_node, test_fabric
from moe_train.training.run_folder import now, write_atomically

EXIT_UNFIT = 5
RETRY_SECONDS = 0.2


class Peer:
    """One end of a connection that carries a JSON value a line."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._file = connection.makefile("rw", encoding="utf-8", newline="\n")

    def fileno(self) -> int:
        """For `select`."""
        return self._connection.fileno()

    def send(self, value: Any) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def receive(self, seconds: float) -> Any:
        """The next value. Raises OSError when none comes in time, or the other end has gone."""
        self._connection.settimeout(max(0.01, seconds))
        line = self._file.readline()
        if not line:
            raise ConnectionError("the other end has gone")
        return json.loads(line)


def attend(name: str, first: str, port: int, key: str, settings: Settings) -> int:
    """One node's part: look at itself, tell the first node, do what that one asks; the status of the verdict."""
    report = check_node(name, settings)
    peer = _connect(first, port, settings.timeout)
    peer.send({"key": key, **asdict(report)})
    while True:
        asked = peer.receive(10 * settings.timeout)
        if asked["do"] == "clock":
            peer.send(time.time())
        elif asked["do"] == "exchange":
            peer.send(
                test_fabric(
                    asked["rank"], asked["world_size"], asked["address"], asked["port"], settings, lambda: _said(peer)
                )
            )
        elif asked["do"] == "end":
            return asked["status"]


class Judge:
    """The first node's part: hear all nodes, have them exchange data, and decide.

    Args:
        names: the nodes that are to take part, in Slurm's order.
        server: where they report to.
        key: of this start; whoever brings another one is not of this job.
    """

    def __init__(self, names: Sequence[str], server: socket.socket, key: str, settings: Settings):
        self.names, self.settings = list(names), settings
        self.reports: dict[str, Report] = {}
        self.figures: dict[str, Any] | None = None
        self.trouble: str | None = None
        self.folder_problem: str | None = None
        self._server, self._key = server, key
        self._peers: dict[str, Peer] = {}
        self._rounds = 0

    def decide(self) -> int:
        """Leave the verdict in the notes, tell the nodes, and return the status: 0 where the job can start."""
        self._hear()
        self._compare_folders()
        if self.folder_problem is None:
            self._compare_clocks()
            self._exchange()
        good = self._good()
        enough = len(good) >= self.settings.wanted and self.trouble is None and self.folder_problem is None
        status = 0 if enough else EXIT_UNFIT
        self._write(good[: self.settings.wanted] if enough else [])
        for peer in self._peers.values():
            try:
                peer.send({"do": "end", "status": status})
            except OSError:
                pass
        return status

    def _good(self) -> list[str]:
        return [name for name in self.names if not self.reports[name].problems]

    def _blame(self, name: str, problem: str) -> None:
        self.reports[name].problems.append(problem)

    def _hear(self) -> None:
        end = time.monotonic() + self.settings.timeout
        while len(self._peers) < len(self.names) and (left := end - time.monotonic()) > 0:
            self._server.settimeout(left)
            try:
                peer = Peer(self._server.accept()[0])
                said = peer.receive(5.0)
            except (OSError, ValueError):
                continue
            if isinstance(said, dict) and said.pop("key", None) == self._key and said.get("name") in self.names:
                self.reports[said["name"]], self._peers[said["name"]] = Report(**said), peer
        for name in self.names:
            if name not in self.reports:
                self.reports[name] = Report(name, [f"did not answer within {self.settings.timeout:g} s"])

    def _compare_folders(self) -> None:
        """The run's folder: the fault of those who cannot write it, nobody's where that is all."""
        found = {name: self.reports[name].folder_problem for name in self._peers}
        if found and all(found.values()):
            self.folder_problem = next(iter(found.values()))
            return
        for name, problem in found.items():
            if problem is not None:
                self._blame(name, problem)

    def _compare_clocks(self) -> None:
        offsets: dict[str, float] = {}
        for name in self._good():
            try:
                before = time.time()
                self._peers[name].send({"do": "clock"})
                theirs = self._peers[name].receive(10.0)
            except (OSError, ValueError):
                self._blame(name, "stopped to answer")
                continue
            offsets[name] = theirs - (before + time.time()) / 2
        middle = statistics.median_low(offsets.values()) if offsets else 0.0
        for name, offset in offsets.items():
            self.reports[name].facts["clock"] = round(offset - middle, 3)
            if abs(offset - middle) > self.settings.clock_skew:
                self._blame(name, f"its clock is {offset - middle:+.1f} s off the others'")

    def _exchange(self) -> None:
        """All good nodes together; where that shows a fault, smaller and smaller groups."""
        good = self._good()
        if not good:
            return
        problem, self.figures = self._try([good])[0]
        if problem is None:
            return
        for name, fault in self._locate(good).items():
            self._blame(name, fault)
        fit = self._good()
        if fit == good:
            self.trouble = problem  # everybody's, or the network's: nobody to leave out
        elif fit:
            self.trouble, self.figures = self._try([fit])[0]

    def _locate(self, good: list[str]) -> dict[str, str]:
        """Whose fault it is that `good` do not exchange data: each alone, then with its neighbours in a ring, and who
        failed with all of them once more with one that did not."""
        alone = self._try([[name] for name in good])
        guilty = {name: f"alone: {fault}" for name, (fault, _) in zip(good, alone) if fault is not None}
        ring = [name for name in good if name not in guilty]
        if len(ring) < 3:
            return guilty  # of two nobody can tell which
        faults: dict[str, list[str | None]] = {name: [] for name in ring}
        pairs = list(zip(ring, [*ring[1:], ring[0]]))
        for groups in (pairs[:-1:2], pairs[1:-1:2], pairs[-1:]):  # in each nobody is twice
            for pair, (fault, _) in zip(groups, self._try([list(pair) for pair in groups])):
                for name in pair:
                    faults[name].append(fault)
        suspects = [name for name in ring if None not in faults[name]]
        sound = [name for name in ring if None in faults[name]]
        while suspects and sound:
            pairs = list(zip(sound, suspects))
            for (partner, name), (fault, _) in zip(pairs, self._try([list(pair) for pair in pairs])):
                if fault is not None:
                    guilty[name] = f"with {partner}: {fault}"
            suspects = suspects[len(pairs) :]
        return guilty

    def _try(self, groups: list[list[str]]) -> list[tuple[str | None, dict[str, Any] | None]]:
        """Have the nodes of each group exchange data, all groups at once: what went wrong, and the figures."""
        self._rounds += 1
        ranks, port = self.settings.ranks_per_node, int(os.environ["MASTER_PORT"])
        waiting: dict[str, int] = {}
        for number, group in enumerate(groups):
            for place, name in enumerate(group):
                # A port of its own for each group and round: those before may linger.
                task = {
                    "rank": place * ranks,
                    "world_size": len(group) * ranks,
                    "address": group[0],
                    "port": port + 1 + self._rounds * 40 + number,
                }
                self._send(name, {"do": "exchange", **task})
                waiting[name] = number
        problems: list[str | None] = [None] * len(groups)
        figures: list[dict[str, Any] | None] = [None] * len(groups)
        end = time.monotonic() + self.settings.timeout + 30
        while waiting:
            ready = {self._peers[name]: name for name in waiting}
            for peer in select.select(list(ready), [], [], max(0.0, end - time.monotonic()))[0] or list(ready):
                name = ready[peer]
                number = waiting.pop(name)
                said = self._answer(name)
                figures[number] = figures[number] or said["figures"]
                if said["problem"] and problems[number] is None:
                    problems[number] = said["problem"]
                    for other in groups[number]:  # they would wait for it until the limit
                        if other in waiting:
                            self._send(other, {"do": "stop"})
        return [(problem or self._slow(speeds), speeds) for problem, speeds in zip(problems, figures)]

    def _send(self, name: str, value: Any) -> None:
        try:
            self._peers[name].send(value)
        except OSError:
            pass  # noticed when it does not answer

    def _answer(self, name: str) -> dict[str, Any]:
        try:
            return self._peers[name].receive(1.0)
        except (OSError, ValueError):
            return {"figures": None, "problem": f"{name} stopped to answer"}

    def _slow(self, figures: dict[str, Any] | None) -> str | None:
        speed, least = (figures or {}).get("all_reduce"), self.settings.gigabytes_per_second
        return (
            f"all-reduce at {speed:.2f} GB/s, less than {least:g}"
            if speed is not None and least is not None and speed < least
            else None
        )

    def _write(self, chosen: list[str]) -> None:
        bad = {name: "; ".join(report.problems) for name, report in self.reports.items() if report.problems}
        notes = Path(self.settings.notes)
        if self.folder_problem:  # before the notes, which may take nothing
            print(f"preflight: the run's folder {self.folder_problem}: make room, or repair it", flush=True)
        facts = {name: report.facts for name, report in self.reports.items()}
        verdict = {
            "time": now(),
            "key": self._key,
            "bad": bad,
            "chosen": chosen,
            "fabric": self.figures,
            "trouble": self.trouble,
            "folder_problem": self.folder_problem,
            "nodes": facts,
        }
        write_atomically(notes / "preflight.json", json.dumps(verdict, indent=1) + "\n")
        write_atomically(notes / "bad_nodes", "".join(f"{name}\n" for name in bad))
        if self.folder_problem:
            write_atomically(notes / "folder_problem", self.folder_problem + "\n")
        if chosen:
            write_atomically(notes / "good_nodes", "".join(f"{name}\n" for name in chosen))
        for name, problem in bad.items():
            print(f"preflight: {name} is unfit: {problem}", flush=True)
        if self.trouble:
            print(f"preflight: the nodes do not exchange data as they should: {self.trouble}", flush=True)
        if chosen:
            print(f"preflight: {len(chosen)} nodes are fit{_speeds(self.figures)}", flush=True)


def _speeds(figures: dict[str, Any] | None) -> str:
    if not figures or figures["all_reduce"] is None:
        return ""
    return f"; all-reduce {figures['all_reduce']:.2f} GB/s, all-to-all {figures['all_to_all']:.2f} GB/s"


def _said(peer: Peer) -> bool:
    return bool(select.select([peer], [], [], 0)[0])


def _connect(host: str, port: int, seconds: float) -> Peer:
    end = time.monotonic() + seconds
    while True:
        try:
            return Peer(socket.create_connection((host, port), timeout=10))
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(RETRY_SECONDS)


def main(arguments: Sequence[str] = sys.argv[1:], environment: Mapping[str, str] = os.environ) -> int:
    """This node's part of the preflight; 0 where the job can start, else 5."""
    settings = Settings.from_json(arguments[0])
    names = environment["PREFLIGHT_NODES"].split(",")
    # As Slurm calls it, which need not be what it calls itself.
    name = environment.get("PREFLIGHT_NODE") or environment.get("SLURMD_NODENAME") or socket.gethostname()
    first, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    key = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_RESTART_COUNT') or 0}"
    if name != names[0]:
        try:
            return attend(name, first, port, key, settings)
        except OSError as error:
            print(f"preflight: {name}: {first} is not there to report to ({error})", file=sys.stderr)
            return EXIT_UNFIT
    with socket.create_server(("", port), backlog=len(names)) as server:
        child = os.fork()  # the judge waits for this node as for any other
        if child == 0:
            try:
                attend(name, "127.0.0.1", port, key, settings)
            finally:
                os._exit(0)
        status = Judge(names, server, key, settings).decide()
    os.kill(child, signal.SIGKILL)  # it has nothing left to do, and may hang on a disk
    os.waitpid(child, 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
