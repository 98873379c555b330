"""What the batch script does next, for everything that a start can come to: the script itself, with stand-ins for
Slurm's commands.

`test_on_slurm.py` has the same script on a real Slurm, for what a real one can be brought to do.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.job import load_job
from launch.journal import Journal
from launch.script import render
from tests.launch.runs import write_run

# srun is called for the check of the files, then for the nodes, then for the ranks; a test says what each comes to.
SRUN = """#!/bin/bash
case "$*" in
  *--dry-run*) exit ${T_CHECK:-0} ;;
  *launch.preflight*)
    echo "$T_BAD" | tr , '\\n' | sed '/^$/d' > "$NOTES/bad_nodes"
    if [ -n "$T_FOLDER" ]; then echo "$T_FOLDER" > "$NOTES/folder_problem"; fi
    if [ -n "$T_GOOD" ]; then echo "$T_GOOD" | tr , '\\n' > "$NOTES/good_nodes"; fi
    if [ -n "$T_HANGS" ]; then exec sleep 600; fi ;;
  *)
    echo "$*" >> "$NOTES/ranks"
    sleep ${T_LASTS:-0.01}
    outcome() { # CODE ENDED
      printf '{\\n "code": %s,\\n "reason": "%s",\\n "step": 7,\\n "started": "%s",\\n "ended": %s\\n}\\n' \\
        "$1" "$T_WHY" "$(date -u +%Y-%m-%dT%H:%M:%S.%3N+00:00)" "$2" > "$NOTES/../outcome.json"
    }
    until_noticed() {
      for _ in {1..300}; do if [ "$(cat "$NOTES/ended")" $1 "" ]; then return; fi; sleep 0.1; done
      exit
    }
    if [ -n "$T_CLEARS" ]; then
      stop="$NOTES/../stop"
      touch -d @1 "$stop"
      for _ in {1..300}; do if [ "$(stat -c %Y "$stop")" != 1 ]; then break; fi; sleep 0.1; done
      rm "$stop"
      for _ in {1..300}; do if [ -e "$stop" ]; then outcome 3 '"x"'; break; fi; sleep 0.1; done
    fi
    if [ -n "$T_FOREIGN" ]; then
      outcome "$T_FOREIGN" '"x"'; until_noticed !=
      outcome null null; until_noticed =
    fi
    if [ -n "$T_CODE" ]; then outcome "$T_CODE" '"x"'; fi
    if [ -n "$T_NEWER" ]; then echo "$T_NEWER" > "$NOTES/current"; exec sleep 60; fi
    exit ${T_STATUS:-0} ;;
esac
"""
SCONTROL = """#!/bin/bash
case "$*" in
  *hostnames*) printf 'node1\\nnode2\\n' ;;
  *"show job"*) echo "JobId=7 Restarts=${T_RESTARTS:-0} ExcNodeList=${T_EXCLUDED:-(null)} End" ;;
  requeue*)
    echo "$*" >> "$NOTES/slurm"
    if [ "$(wc -l < "$NOTES/slurm")" -le "${T_AWAY:-0}" ]; then
      echo "slurm_requeue error: Unable to contact slurm controller (connect failure)" >&2; exit 1
    fi
    kill -KILL $PPID ;;
  update*) echo "$*" >> "$NOTES/slurm" ;;
esac
"""
SBATCH = """#!/bin/bash
echo "sbatch $*" >> "$NOTES/slurm"
[ -z "${SLURM_JOB_ID:-}" ] || echo "inherits SLURM_JOB_ID" >> "$NOTES/slurm"
echo "$T_ANSWER"
[ "$T_ANSWER" = 8 ]
"""


@dataclass
class Ended:
    """A start of the script that is over."""

    said: str
    status: int
    notes: Path

    @property
    def end(self) -> dict:
        return [each for each in Journal(self.notes.parent).starts() if each["kind"] == "end"][-1]

    @property
    def over(self) -> dict | None:
        return Journal(self.notes.parent).over()

    @property
    def asked(self) -> list[str]:
        path = self.notes / "slurm"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def start(tmp_path: Path):
    """``start(chain=..., cluster=..., CODE=...)``: the script of a run on two nodes, to its end."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(
        *,
        chain: int = 1,
        spares: int = 0,
        failures: int = 0,
        cancel: bool = False,
        warned: bool = False,
        torn: bool = False,
        full: bool = False,
        late: bool = False,
        watched: bool = False,
        stormy: bool = False,
        stop: float | None = None,
        setup: tuple[str, ...] = (),
        job_id: str = "7",
        **variables: str,
    ) -> Ended:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        job = load_job(str(write_run(folder, {"max_restarts": 1, "setup": list(setup)})), chain=chain, spares=spares)
        job.notes.mkdir(parents=True)
        (job.notes / "jobs.jsonl").write_text(
            '{"time": "t", "job": "7", "nodes": 2}\n{"time": "t", "job": "9", "nodes": 2}\n'
        )
        if stop is not None:
            (job.run_dir / "stop").touch()
            os.utime(job.run_dir / "stop", (stop, stop))
        if full:
            (job.notes / "current").mkdir()  # takes no line
        if torn:  # by a full disk
            for name in ("starts.jsonl", "jobs.jsonl"):
                with open(job.notes / name, "a") as file:
                    file.write('{"time": "t", "jo')
        (job.notes / "failures").write_text("0\n" * failures)
        (job.notes / "ranks").touch()
        script = render(job).replace("  sleep 5\n", "  sleep 0.1\n")  # until a controller that is away is asked again
        if cancel:  # while the ranks are on
            script = script.replace("# ---- the ranks ----", 'touch "$NOTES/cancel"')
        if late:
            script = script.replace("LIMIT=600\n", "LIMIT=1\n")
        script = script.replace("SAID > 30", "SAID > 0")
        if watched:  # whether it thinks that the run has ended
            look = "  if ended; then ENDED="
            script = script.replace(look, f'  echo "$ENDED" > "$NOTES/ended"\n{look}')
            script = script.replace("  sleep 2 >", "  sleep 0.2 >")
        if warned:
            script = script.replace("# ---- the ranks ----", "kill -USR1 $$")
        if stormy:  # of warnings, until the ranks end, among the expansions of the loop
            look = 'while [ -n "$STEP" ]'
            storm = '(while kill -USR1 $$ && kill -0 "$STEP"; do sleep 0.002; done) 2>/dev/null &'
            script = script.replace(look, f"{storm}\n{look}")
            script = script.replace("  sleep 2 >", "  sleep 0 >")
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "NOTES": str(job.notes),
            "SLURM_JOB_ID": job_id,
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CONF": "x",
        }
        variables = {"GOOD": "node1,node2", "WHY": "because", **variables}
        done = subprocess.run(
            ["bash", "-c", script],
            env={**environment, **{f"T_{name}": text for name, text in variables.items()}},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Ended(done.stdout + done.stderr, done.returncode, job.notes)

    return run


NEXT: list[tuple[dict, int | None, str, int | None]] = [
    ({"CODE": "0"}, 0, "over", 0),
    ({"CODE": "1"}, 1, "requeue", None),
    ({"CODE": "2"}, 2, "over", 2),
    ({"CODE": "4"}, 4, "requeue", None),
    ({"CODE": "5"}, 5, "requeue", None),
    ({"CODE": "6"}, 6, "over", 6),
    ({}, None, "requeue", None),
    ({"CHECK": "2"}, 2, "over", 2),
    ({"CODE": "3", "WHY": "signal SIGTERM"}, 3, "requeue", None),
    ({"CODE": "3", "WHY": "file stop"}, 3, "over", 3),
    ({"CODE": "3", "WHY": "file stop", "warned": True}, 3, "requeue", None),
    ({"CODE": "3", "WHY": "file stop", "warned": True, "chain": 2}, 3, "chain", None),
    ({"warned": True, "failures": 1}, None, "requeue", None),
    ({"CODE": "3", "WHY": "file stop", "cancel": True}, 3, "over", 3),
    ({"CODE": "5", "cancel": True}, 3, "over", 3),
    ({"CODE": "5", "failures": 1}, 5, "loop", 6),
    ({"CHECK": "5", "CODE": "5"}, 5, "requeue", None),  # a corpus is gone: one node's fault, as far as one can tell
    ({"CHECK": "5", "CODE": "5", "failures": 1}, 5, "loop", 6),
    ({"CODE": "2", "failures": 1}, 2, "over", 2),
    ({"GOOD": ""}, 5, "requeue", None),
]
"""What a start comes to; the status that is noted, what comes next, and the status in over.json."""


def test_what_comes_next(start) -> None:
    with ThreadPoolExecutor(len(NEXT)) as pool:  # the script sleeps for most of its time
        for (given, code, following, over), ended in zip(NEXT, pool.map(lambda row: start(**row[0]), NEXT)):
            what = f"{given}: {ended.said}"
            assert (ended.end["code"], ended.end["next"]) == (code, following), what
            assert (ended.over["code"] if ended.over else None) == over, what
            assert ended.asked == (["requeue 7"] if following == "requeue" else []), what
            ranks = given.get("CHECK") != "2" and given.get("GOOD") != ""
            assert bool((ended.notes / "ranks").read_text()) == ranks, what


def test_a_stop_that_is_touched_while_the_job_waits_is_obeyed(start) -> None:
    ended = start(CODE="0", stop=1)
    assert ended.over["code"] == ended.end["code"] == ended.status == 3 and ended.end["next"] == "over", ended.said
    assert "file stop, touched before the ranks started" in ended.over["reason"]
    assert not (ended.notes / "ranks").read_text() and ended.asked == []


def test_a_stop_that_is_touched_while_the_ranks_load_is_obeyed(start) -> None:
    """They clear one that they find."""
    ended = start(CLEARS="1", WHY="file stop", watched=True)
    assert ended.over["code"] == 3 and ended.end["next"] == "over", ended.said


def test_a_stop_that_is_left_of_an_earlier_time_limit_is_not(start) -> None:
    ended = start(CODE="0", stop=0)
    assert ended.over["code"] == 0 and (ended.notes / "ranks").read_text(), ended.said


def test_unfit_nodes_are_left_out_with_those_that_were_before(start) -> None:
    ended = start(GOOD="", BAD="node2", EXCLUDED="node9", ANSWER="8", chain=2)
    updates = [f"update JobId={job} ExcNodeList=node9,node2" for job in (7, 9)]
    assert ended.asked == [*updates, f"sbatch --parsable --exclude=node9,node2 {ended.notes}/job.sbatch"], ended.said
    assert Journal(ended.notes.parent).job_ids() == ["7", "9", "8"]
    assert ended.end["next"] == "job 8 without them" and ended.over is None


def test_a_warning_is_not_lost_whenever_it_comes(start) -> None:
    """bash 5.2 loses one that comes while it expands $(...)."""
    ended = start(CODE="3", WHY="file stop", LASTS="3", stormy=True)
    assert ended.end["next"] == "requeue" and ended.end["reason"] == "saved: the time was nearly up", ended.said
    assert ended.said.count("the time is nearly up") > 10 and "unexpected" not in ended.said


def test_an_outcome_that_came_while_the_run_was_loading_is_not_its_end(start) -> None:
    """Somebody's mistaken second start, before there was one at work that it could have seen."""
    ended = start(CODE="0", FOREIGN="2", watched=True)
    assert ended.over["code"] == 0 == ended.status, ended.said


def test_a_start_that_cannot_write_its_notes_says_so(start) -> None:
    ended = start(full=True, CODE="0")
    assert ended.status == 5 and "launch cannot be written, is the disk full?" in ended.said, ended.said
    assert not (ended.notes / "ranks").read_text() and ended.over is None and "another start" not in ended.said


def test_a_controller_that_is_away_is_asked_again(start) -> None:
    ended = start(CODE="5", AWAY="1")
    assert ended.asked == ["requeue 7"] * 2 and "could not be requeued" not in ended.said, ended.said


def test_when_the_time_is_up_the_controller_is_waited_for_no_longer(start) -> None:
    ended = start(CODE="5", AWAY="9", late=True)
    assert ended.asked == ["requeue 7"] and ended.status == 5 and "could not be requeued; submit" in ended.said


def test_a_crash_loop_tells_its_last_reason_as_it_is(start) -> None:
    ended = start(CODE="5", failures=1, WHY='no \\"x\\" in caf\\u00e9')
    assert ended.over["reason"].endswith('with status 5: no "x" in caf\u00e9'), ended.said


def test_what_a_sites_lines_set_in_the_shell_ends_no_script(start) -> None:
    ended = start(CODE="5", STATUS="5", setup=("set -euo pipefail",))
    assert ended.end["next"] == "requeue" and ended.asked == ["requeue 7"], ended.said


def test_a_job_that_was_submitted_by_hand_is_noted(start) -> None:
    """So that `launch status` and `launch cancel` know it, and `launch slurm` does not start a second one beside it."""
    journal = Journal(start(CODE="0", job_id="8").notes.parent)
    assert journal.job_ids() == ["7", "9", "8"] and journal.jobs()[-1]["nodes"] == 2
    assert Journal(start(CODE="0").notes.parent).job_ids() == ["7", "9"]


def test_half_a_line_in_the_notes_costs_no_other(start) -> None:
    ended = start(GOOD="", BAD="node2", ANSWER="8", torn=True)
    journal = Journal(ended.notes.parent)
    assert journal.job_ids() == ["7", "9", "8"] and journal.jobs()[-1]["nodes"] == 2
    assert [each["kind"] for each in journal.starts()] == ["start", "end"]


def test_where_there_are_no_other_nodes_the_run_is_over(start) -> None:
    ended = start(GOOD="", BAD="node2", ANSWER='sbatch: error: "no" nodes')
    assert ended.over["code"] == 5 and "no job without them: sbatch: error: no nodes" in ended.over["reason"], (
        ended.said
    )


def test_a_full_folder_of_the_run_ends_it(start) -> None:
    ended = start(GOOD="", FOLDER='/a "b" has 0.10 GB free, less than 1')
    assert ended.over["code"] == 5 and ended.over["reason"] == "the run's folder /a b has 0.10 GB free, less than 1"
    assert ended.asked == [] and ended.end["next"] == "over" and not (ended.notes / "ranks").read_text()


def test_spare_nodes_take_the_place_of_unfit_ones(start) -> None:
    ended = start(GOOD="node2,node3", BAD="node1", CODE="0", spares=1)
    assert ended.over["code"] == 0 and "unfit: node1; goes on with spare nodes" in ended.said
    assert "--nodes=2 --ntasks=2 --nodelist=node2,node3" in (ended.notes / "ranks").read_text()


def test_a_node_that_hangs_is_not_waited_for_once_the_others_are_judged(start) -> None:
    ended = start(GOOD="node2,node3", BAD="node1", CODE="0", HANGS="1", spares=1)
    assert ended.over["code"] == 0 and "unfit: node1; goes on with spare nodes" in ended.said


@pytest.mark.parametrize("given", [{"NEWER": "7.1"}, {"RESTARTS": "1", "CODE": "5"}], ids=str)
def test_a_start_that_has_been_replaced_decides_nothing(start, given: dict) -> None:
    ended = start(**given)
    assert "another start goes on with the run" in ended.said
    assert ended.over is None and ended.asked == []
    assert not [each for each in Journal(ended.notes.parent).starts() if each["kind"] == "end"]
