"""The batch script of a job, rendered from `job.sbatch`. The same text is printed, validated and submitted."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from importlib import resources

from launch.cluster import ClusterConfig
from launch.job import Job, named_variables
from moe_train.errors import UserError
from moe_train.units import format_time


def render(job: Job) -> str:
    """The sbatch script of `job`, ending with a newline.

    Raises UserError: something does not fit in a batch script, or is not visible in the container.
    """
    parts = {
        "LOGIN": " -l" if job.cluster.modules else "",  # `module` is defined for login shells
        "TITLE": _title(job),
        "DIRECTIVES": "\n".join(f"#SBATCH {option}" for option in directives(job)),
        "RUN_DIR": shlex.quote(str(job.run_dir)),
        "SUBMIT_DIR": shlex.quote(str(job.submit_dir)),
        "LIMIT": str(math.ceil(job.seconds / 60) * 60),
        "LEAD": str(job.lead),
        "MAX_RESTARTS": str(job.cluster.max_restarts),
        "CHAIN": "1" if job.chain > 1 else "0",
        "ENVIRONMENT": "\n".join(environment(job.cluster, named_variables(job.run_file, job.overrides, job.config))),
        "ALERTS": "\n".join(alerts(job)),
        "STALL": str(math.ceil(job.config.faults.step_timeout / 2)),
        "CHECK": check_command(job),
        "NODES": preflight(job),
        "LAUNCH": launch_command(job),
    }
    template = resources.files("launch").joinpath("job.sbatch").read_text(encoding="utf-8")
    text = re.sub(r"@([A-Z_]+)@", lambda match: parts[match[1]], template)
    return text.replace("\n\n}", "\n}")  # where nobody is told


def directives(job: Job) -> list[str]:
    """The options of sbatch, most important first."""
    cluster, torchrun = job.cluster, job.cluster.launcher == "torchrun"
    named = {
        "job-name": job.name,
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "nodes": job.nodes + job.spares,
        "ntasks-per-node": 1 if torchrun else cluster.ranks_per_node,
        "gpus-per-node": _gpus(job) if cluster.gpus_per_node else None,
        "cpus-per-task": (cluster.cpus_per_task or 0) * (cluster.ranks_per_node if torchrun else 1) or None,
        "mem": cluster.memory,
        "time": slurm_time(job.seconds),
        "signal": f"B:USR1@{job.lead}",
        "output": f"{_in_directive(str(job.run_dir / 'logs'))}/slurm-%j.out",
        "open-mode": "append",
        "dependency": "singleton" if job.chain > 1 else None,
    }
    lines = [f"--{key}={_quoted(str(value))}" for key, value in named.items() if value is not None]
    lines += ["--requeue", "--wait-all-nodes=1"]
    lines += ["--exclusive"] if cluster.exclusive else []
    return lines + list(cluster.sbatch)


def environment(cluster: ClusterConfig, named: Mapping[str, str]) -> list[str]:
    """Lines of shell that set up what the ranks inherit; `named` are the variables that the run's files name."""
    lines = [f"module load {' '.join(cluster.modules)}"] if cluster.modules else []
    if cluster.venv:
        lines += [f"export VIRTUAL_ENV={shlex.quote(cluster.venv)}", 'export PATH="$VIRTUAL_ENV/bin:$PATH"']
    variables = {**named, **cluster.env}
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if cluster.scratch:
        lines.append(f"export TMPDIR={shlex.quote(cluster.scratch)}")
    return lines + list(cluster.setup)


def alerts(job: Job) -> list[str]:
    """Lines of the script's function `tell`. An alert that fails or hangs is not in the way."""
    cluster, text = job.cluster, f'"{job.name}: $SELF: $1"'
    lines = [f"  timeout 20 {cluster.alert_command} {text} || true"] if cluster.alert_command else []
    if cluster.alert_webhook:
        lines += [
            f"  local text={text}",
            r"""  text=${text//\\/} text=${text//\"/}    # what JSON would want escaped""",
            f'  curl -fsS -m 20 -H \'Content-Type: application/json\' --data "{{\\"text\\": \\"$text\\"}}"'
            f" {shlex.quote(cluster.alert_webhook)} > /dev/null || true",
        ]
    return lines


def check_command(job: Job) -> str:
    """The srun that looks at the run's files as one process on one node."""
    check = ["--dry-run", "--nproc", str(job.ranks)]
    return _lines(
        [
            "srun --nodes=1 --ntasks=1",
            *_container(job),
            f"{shlex.quote(job.python)} {shlex.join([*job.command(), *check])}",
        ]
    )


_PREFLIGHT = """\
PREFLIGHT_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
export PREFLIGHT_NODES
rm -f "$NOTES/good_nodes" "$NOTES/bad_nodes" "$NOTES/folder_problem"
{command} &
LOOK=$! SAID=
while kill -0 "$LOOK" 2>/dev/null; do
  # A node that hangs is waited for no longer once the verdict is there.
  if [ -e "$NOTES/bad_nodes" ]; then SAID=${{SAID:-$SECONDS}}; fi
  if [ -n "$SAID" ] && ((SECONDS - SAID > 30)); then kill "$LOOK"; fi
  sleep 2 > /dev/null 2>&1 &
  wait -n $! "$LOOK" 2>/dev/null
done
give_way
if [ -e "$NOTES/folder_problem" ]; then
  PROBLEM="the run's folder $(tr -d '"\\134' < "$NOTES/folder_problem")"
  note_end 5 "\\"$PROBLEM\\"" over
  finish 5 "\\"$PROBLEM\\""
fi
BAD=$(paste -sd, "$NOTES/bad_nodes" 2>/dev/null)
if [ -e "$NOTES/good_nodes" ]; then
  if [ -n "$BAD" ]; then tell "unfit: $BAD; goes on with spare nodes"; fi
  MASTER_ADDR=$(head -n 1 "$NOTES/good_nodes")
elif [ -n "$BAD" ]; then leave_out "$BAD"
else CODE=5 REASON='"the nodes could not be checked, or do not exchange data; see the log of the job"'
fi
"""


def preflight(job: Job) -> str:
    """Lines that look at the nodes; what they leave in the notes decides. Empty where they are not to be looked at."""
    command = job.preflight()
    if not command:
        return ""
    nodes, limit = job.nodes + job.spares, math.ceil(8 * job.cluster.preflight.timeout)
    srun = f"timeout --kill-after=10 {limit} srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1"
    return _PREFLIGHT.format(
        command=_lines([srun, *_container(job), f"{shlex.quote(job.python)} {shlex.join(command)}"])
    )


def launch_command(job: Job) -> str:
    """The srun that starts the ranks."""
    cluster, python = job.cluster, shlex.quote(job.python)
    if cluster.launcher == "torchrun":
        python += (
            f" -m torch.distributed.run --nnodes={job.nodes} --nproc-per-node={cluster.ranks_per_node}"
            ' --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$SLURM_JOB_ID.$RESTART"'
        )
    tasks = 1 if cluster.launcher == "torchrun" else cluster.ranks_per_node
    chosen = (
        [f'--nodes={job.nodes} --ntasks={job.nodes * tasks} --nodelist="$(paste -sd, "$NOTES/good_nodes")"']
        if job.spares
        else []
    )
    return _lines(
        ["srun --kill-on-bad-exit=1 --wait=60", *chosen, *_container(job), f"{python} {shlex.join(job.command())}"], 4
    )


def _container(job: Job) -> list[str]:
    """pyxis' options of srun."""
    container, scratch = job.cluster.container, job.cluster.scratch
    if container is None:
        return []
    mounts = [*container.mounts, *([scratch] if scratch else [])]
    full = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
    options = [f"--container-image={shlex.quote(container.image)}"]
    options += [f"--container-mounts={shlex.quote(full)}"] if full else []
    return [*options, f"--container-workdir={shlex.quote(job.inside(job.submit_dir))}"]


def _lines(parts: list[str], indent: int = 2) -> str:
    """A long command, a line an option."""
    return (" \\\n" + " " * indent).join(parts)


def slurm_time(seconds: float) -> str:
    """A time limit as Slurm writes it, in whole minutes: ``2-00:00:00``."""
    minutes = math.ceil(seconds / 60)
    days, rest = divmod(minutes, 24 * 60)
    return (f"{days}-" if days else "") + f"{rest // 60:02d}:{rest % 60:02d}:00"


def _gpus(job: Job) -> str:
    kind = f"{job.cluster.gpu_type}:" if job.cluster.gpu_type else ""
    return f"{kind}{job.cluster.gpus_per_node}"


def _title(job: Job) -> str:
    unit = "GPUs" if job.cluster.gpus_per_node else "ranks"
    text = f"{job.name}: {job.nodes} nodes x {job.cluster.ranks_per_node} {unit} of {job.cluster.name}"
    return f"{text}, at most {format_time(job.seconds)}" + (f", one of {job.chain} in a chain" if job.chain > 1 else "")


def _in_directive(path: str) -> str:
    if "\n" in path or '"' in path or "\\" in path:
        raise UserError(
            f"output_dir {path!r} cannot stand in a batch script; choose a path without quotes, \\ and line breaks"
        )
    return path.replace("%", "%%")


def _quoted(value: str) -> str:
    """A directive's value; without quotes ``#`` would end it, and a quote mark would join it to what follows."""
    return value if re.fullmatch(r"[\w.,:/@%+=-]*", value, re.ASCII) else f'"{value}"'
