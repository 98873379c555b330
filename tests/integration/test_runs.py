"""`moe-train pretrain` from the outside: trains, stops, resumes, refuses, survives a lost rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.integration.runs import ROOT, arithmetic, metrics, outcome, run, start, write_corpora
from tests.moe_train.checkpoint.test_save import assert_equal, contents


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """The folder of an undisturbed run of 40 steps with a checkpoint every 8."""
    folder = tmp_path_factory.mktemp("complete")
    write_corpora(folder)
    status, said = run(folder, fresh=True)
    assert status == 0, said
    return folder


@pytest.fixture
def cut(complete, tmp_path) -> Path:
    """A copy of that run that ended after step 8."""
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    place = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**place, "output_dir": str(tmp_path / "run")}))
    checkpoints = tmp_path / "run" / "checkpoints"
    for later in sorted(checkpoints.glob("iter_*"))[1:]:
        shutil.rmtree(later)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("8\n")
    for name in ("config.yaml", "config.1.yaml"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(str(complete), str(tmp_path)))
    return tmp_path


def test_a_document_mask_reaches_the_model(complete, tmp_path):
    from data_pipeline.tokenizer import train_tokenizer

    write_corpora(tmp_path)
    text = shutil.copy(ROOT / "README.md", tmp_path / "text.txt")
    train_tokenizer([text], tmp_path / "tokenizer.model", vocab_size=350)
    status, said = run(tmp_path, "data.document_mask=true", "training.max_steps=1", nproc=1)
    assert status == 2 and "data.document_mask" in said and "tokenizer" in said
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(mixture.read_text() + "tokenizer: tokenizer.model\n")
    losses = []
    for number, masked in enumerate(("true", "false")):
        output = f"output_dir={tmp_path}/run{number}"
        status, said = run(
            tmp_path, f"data.document_mask={masked}", "training.max_steps=1", "parallel.expert=1", output, nproc=1
        )
        assert status == 0, said
        losses.append(metrics(tmp_path / f"run{number}")[0]["loss"])
    expected = metrics(complete / "run")[0]["loss"]
    assert losses[1] == pytest.approx(expected, rel=2e-5)
    assert abs(losses[0] - expected) > 1e-4 * expected


def test_a_run_leaves_what_it_promises(complete):
    folder = complete / "run"
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert [line["tokens"] for line in lines] == [64 * step for step in range(1, 41)]
    assert [line["phase"] for line in lines] == ["stable"] * 20 + ["decay"] * 20
    wanted = {"loss", "load_balancing_loss", "z_loss", "grad_norm", "lr", "tokens_per_second", "step_seconds"}
    assert all({*wanted, "tflops_per_gpu", "mfu"} <= set(line) for line in lines)
    assert [line["step"] for line in lines if "validation/web" in line] == [8, 16, 24, 32, 40]
    assert set(lines[1]["routers"]) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("attention", "mlp")}
    assert outcome(folder)["code"] == 0 and outcome(folder)["step"] == 40
    for name in (
        "config.yaml",
        "config.1.yaml",
        "events.jsonl",
        "ledger.json",
        "logs/rank_00000.log",
        "logs/rank_00001.log",
    ):
        assert (folder / name).exists(), name
    said = (folder / "logs/rank_00000.log").read_text()
    assert said.count("warning: data.validation measures not all: no held-out window of 16 tokens in code;") == 1
    assert (folder / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "40\n"
    checkpoint = folder / "checkpoints/iter_0000040"
    for name in (".metadata", "run_state.json", "manifest.json", "manifest.json.xxh3"):
        assert (checkpoint / name).exists(), name


def test_a_complete_run_says_so_and_how_to_go_on(complete):
    before = metrics(complete / "run")
    status, said = run(complete)
    assert status == 0 and "is complete" in said and "more tokens" in said
    assert metrics(complete / "run") == before


def test_a_resume_repeats_the_undisturbed_run_bit_for_bit(complete, cut):
    status, said = run(cut)
    assert status == 0, said
    assert "resumed from" in said
    assert arithmetic(metrics(cut / "run")) == arithmetic(metrics(complete / "run"))


def test_routers_that_adapt_go_on_bit_for_bit_and_are_reported(tmp_path):
    """Skywork's: normalised logits, tokens that are dropped, coefficients that follow, which a checkpoint keeps."""
    router = "{normalize_logits: true, load_balancing: skywork, capacity_factor: 1.0, drop_by: probability"
    router += ", adaptive: {beta: 0.8, max_coef: 0.1}}"
    settings = (
        f"model.mlp.router={router}",
        "logging.router_gates=true",
        "logging.expert_similarity=8 steps",
        "data.validation=null",
    )
    folders = tmp_path / "whole", tmp_path / "cut"
    for folder in folders:
        folder.mkdir()
        write_corpora(folder)
    for folder, limits in zip(folders, ((12,), (8, 12))):
        for limit in limits:
            status, said = run(folder, *settings, f"training.max_steps={limit}")
            assert status == 0, said
    whole, cut = (metrics(folder / "run") for folder in folders)
    assert arithmetic(cut) == arithmetic(whole) and [line.get("routers") for line in cut] == [
        line.get("routers") for line in whole
    ]
    assert [line["step"] for line in whole if "similarity" in line.get("routers", {}).get("layers.0.mlp", {})] == [8]
    mlp, attention = (whole[-1]["routers"][f"layers.1.{part}"] for part in ("mlp", "attention"))
    assert 0 < mlp["drop_rate"] < 1 and 1 < mlp["max1_over_max2"] and mlp["load_balancing_coef"] > 0.011
    assert "drop_rate" not in attention and "load_balancing_coef" not in attention
    assert attention["max2_over_max3"] > 1


def test_a_resume_on_another_layout_goes_on_with_the_same_curve(complete, cut):
    status, said = run(cut, "parallel.tensor=2", "--parallel.expert=1")
    assert status == 0, said
    for line, expected in zip(metrics(cut / "run"), metrics(complete / "run")):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_longer_mixture_is_taken_up_and_recorded(cut):
    mixture = yaml.safe_load((cut / "mixture.yaml").read_text())
    mixture["phases"][1]["tokens"] += 8 * 16
    mixture["phases"][1]["weights"] = {"web": 5, "code": 1}
    (cut / "mixture.yaml").write_text(yaml.safe_dump(mixture, sort_keys=False))
    status, said = run(cut)
    assert status == 0, said
    assert len(metrics(cut / "run")) == 42
    assert "the mixture was edited" in said and '"kind": "mixture"' in (cut / "run/events.jsonl").read_text()


def test_a_stop_file_saves_and_ends_with_3(tmp_path):
    write_corpora(tmp_path)
    mixture = yaml.safe_load((tmp_path / "mixture.yaml").read_text())
    mixture["phases"] = [{"name": "long", "tokens": "1M", "weights": {"web": 1}}]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    process = start(tmp_path, "checkpoint.interval=1000", "data.validation=null")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / "run/stop").touch()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 3 and "it is saved: start it again to go on" in said, said
    step = outcome(tmp_path / "run")["step"]
    assert outcome(tmp_path / "run")["code"] == 3 and "stop" in outcome(tmp_path / "run")["reason"]
    assert (tmp_path / f"run/checkpoints/iter_{step:07d}/manifest.json.xxh3").exists()


def test_a_killed_rank_ends_the_run_with_5_and_it_resumes(complete, cut):
    process = start(cut, "checkpoint.interval=1 steps", fresh=True)
    log = cut / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(log.read_text().splitlines()) > 8 and time.monotonic() < deadline:
        time.sleep(0.01)  # the resumed run cuts the metrics back to step 8
    while len(log.read_text().splitlines()) <= 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 5, said
    assert "killed by SIGKILL" in said
    assert outcome(cut / "run")["code"] == 5
    status, said = run(cut)
    assert status == 0, said
    assert [line[:8] for line in arithmetic(metrics(cut / "run"))] == [
        line[:8] for line in arithmetic(metrics(complete / "run"))
    ]


def test_a_run_whose_disk_is_gone_goes_on_from_the_object_store(complete, tmp_path, s3):
    write_corpora(tmp_path)
    place = f"checkpoint.copy_to={s3}"
    status, said = run(tmp_path, place, "training.max_steps=16")
    assert status == 0, said
    shutil.rmtree(tmp_path / "run")
    status, said = run(tmp_path, place)
    assert status == 0 and "holds no whole checkpoint; iter_0000016 was fetched from s3://" in said, said
    assert arithmetic(metrics(tmp_path / "run")) == arithmetic(metrics(complete / "run"))
    assert (tmp_path / "run/config.2.yaml").exists()  # the count of starts goes on
    status, said = run(tmp_path, place, f"output_dir={tmp_path}/elsewhere/run")
    assert status == 2 and f"has the copies of the run in {tmp_path}/run, not of {tmp_path}/elsewhere/run" in said, said


def test_a_spike_goes_back_to_the_last_checkpoint_and_past_its_data(tmp_path):
    """The gradient norm of this run jumps at step 35, five steps after a checkpoint."""
    write_corpora(tmp_path)
    mixture = yaml.safe_load((tmp_path / "mixture.yaml").read_text())
    (stable, _), tokens = mixture["phases"], sum(phase["tokens"] for phase in mixture["phases"])
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({**mixture, "phases": [{**stable, "tokens": tokens}]}))
    options = ("faults.spike_deviations=3", "checkpoint.interval=6 steps", "training.max_steps=35")
    status, said = run(tmp_path, *options, "faults.on_spike=ignore", f"output_dir={tmp_path}/calm")
    assert status == 0, said
    status, said = run(tmp_path, *options, "faults.on_spike=rewind", "faults.check_replicas=5 steps")
    assert status == 0, said
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "rewind"]
    assert event["step"] == 35 and event["first_sample"] == 4 * 30 and event["samples"] == 20 and event["count"] == 1
    assert "is a spike" in event["reason"] and event["checkpoint"].endswith("iter_0000030")
    assert "went back to iter_0000030, past samples 120 to 139 (1 " in said
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    assert [segment["skipped"] for segment in ledger["segments"]] == [[[120, 140]]]
    # The curve up to there is the undisturbed one's; the weights in the last checkpoint are those of step 30.
    assert [line[:8] for line in arithmetic(metrics(tmp_path / "run"))] == [
        line[:8] for line in arithmetic(metrics(tmp_path / "calm"))
    ]
    found = [contents(tmp_path / f"run/checkpoints/iter_00000{step}") for step in (30, 35)]
    assert_equal(*found)
    # Resumed from elsewhere it goes back to there, and not to what else its folder holds.
    shutil.rmtree(tmp_path / "run/checkpoints/iter_0000030")
    origin = ("--resume", f"{tmp_path}/calm/checkpoints/iter_0000030")
    status, said = run(tmp_path, *options, "faults.on_spike=rewind", "checkpoint.interval=100 steps", *origin)
    assert status == 0 and "went back to iter_0000030, past samples 120 to 139 (1 " in said, said


def test_what_is_never_finite_again_stops_the_run_with_6(tmp_path):
    write_corpora(tmp_path)
    options = ("optimizer.lr=1e30", "schedule.warmup_init_ratio=1.0", "faults.max_skips=3", "data.validation=null")
    status, said = run(tmp_path, *options)
    assert status == 6 and "max_skips 3 of the last 1000 updates" in said, said
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    skips = [event for event in events if event["kind"] == "skip"]
    assert [(event["step"], event["first_sample"], event["samples"], event["count"]) for event in skips] == [
        (2, 4, 4, 1),
        (3, 8, 4, 2),
        (4, 12, 4, 3),
    ]
    assert json.loads((tmp_path / "run/owner.json").read_text())["ended"]


@pytest.mark.parametrize(
    "limit, warmup, tokens", [(None, None, 2560), (7, None, 448), (99, None, 2560), (20, 400, 864)]
)
def test_the_way_to_the_end_is_known(tmp_path, limit, warmup, tokens):
    """What the console's time of arrival goes by: the end of the mixture or max_steps, whichever comes first."""
    from types import SimpleNamespace

    from moe_train.training.config import BatchSizeWarmup, TrainingConfig
    from moe_train.training.trainer import Position, Trainer

    grown = None if warmup is None else BatchSizeWarmup(start=2, tokens=warmup)
    training = TrainingConfig(micro_batch_size=2, global_batch_size=4, batch_size_warmup=grown, max_steps=limit)
    run = SimpleNamespace(
        config=SimpleNamespace(training=training),
        position=Position(),
        stream=SimpleNamespace(num_samples=160),
        sequence_length=16,
    )
    assert Trainer.last_token.fget(run) == tokens


def test_weights_alone_start_a_new_run(complete, tmp_path):
    write_corpora(tmp_path)
    source = complete / "run/checkpoints/iter_0000040"
    status, said = run(
        tmp_path, f"checkpoint.initialize_from={source}", "training.max_steps=1", "data.validation=null", nproc=2
    )
    assert status == 0, said
    first = metrics(tmp_path / "run")[0]
    assert first["step"] == 1 and first["loss"] < metrics(complete / "run")[0]["loss"]


def test_a_trained_model_becomes_a_mixture_of_depths(complete, tmp_path):
    """With gates near 1 it begins where it was, its gated layers are told of, and the run is resumed like any."""
    write_corpora(tmp_path)
    keys = [
        f"checkpoint.initialize_from={complete / 'run/checkpoints/iter_0000040'}",
        "model.depth.initial_gate=0.999",
        "data.validation=null",
        "optimizer.lr=1e-3",
    ]
    status, said = run(tmp_path, *keys, "training.max_steps=2", nproc=2)
    assert status == 0, said
    status, said = run(tmp_path, *keys, "training.max_steps=4", "parallel.expert=1", "parallel.tensor=2", nproc=2)
    assert status == 0, said
    plain = [keys[0], "data.validation=null", "training.max_steps=1", f"output_dir={tmp_path}/plain"]
    status, said_of_plain = run(tmp_path, *plain, nproc=2)
    assert status == 0, said_of_plain
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[0]["depth"] == 1.0
    assert lines[0]["loss"] == pytest.approx(metrics(tmp_path / "plain")[0]["loss"], abs=2e-3)
    assert lines[1]["depths"].keys() == {"layers.1"} and 0.9 < lines[1]["depths"]["layers.1"]["gate"] < 1
    assert "depth 1.000" in said and "depth" not in metrics(tmp_path / "plain")[0]


def test_a_branch_keeps_optimizer_and_position(complete, tmp_path):
    write_corpora(tmp_path)
    shutil.copytree(complete, tmp_path / "origin")
    status, said = run(tmp_path, verb=("branch", f"{tmp_path}/origin/run@8"))
    assert status == 0, said
    assert arithmetic(metrics(tmp_path / "run")) == arithmetic(metrics(complete / "run"))


def test_micro_batches_may_take_turns(tmp_path):
    """The losses of a run are the same whether or not one micro-batch computes while the other's rows travel."""
    write_corpora(tmp_path)
    losses = []
    for overlap in ("true", "false"):
        folder = tmp_path / overlap
        keys = [f"output_dir={folder}", f"parallel.overlap_dispatch={overlap}", "training.micro_batch_size=1"]
        status, said = run(tmp_path, *keys, "training.max_steps=4")
        assert status == 0, said
        losses.append([line["loss"] for line in metrics(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


@pytest.mark.parametrize(
    "change, words",
    [
        (["training.globl_batch_size=8"], ["training.globl_batch_size", "global_batch_size"]),
        (["training.micro_batch_size=two"], ["training.micro_batch_size", "two"]),
        (["parallel.tensor=2", "parallel.pipeline=2"], ["does not divide the 2 processes", "4 processes"]),
        (["parallel.expert=3"], ["3"]),
        (["data.mixture=nowhere.yaml"], ["nowhere.yaml"]),
        (["--resume", "iter_0000999"], ["iter_0000999"]),
        (["training.precision=fp8"], ["fp8 multiplies in multiples of 16", "hidden_size"]),
        (["parallel.dispatcher=flex", "parallel.expert=2"], ["parallel.dispatcher", "flex sends bf16 only"]),
        (
            ["parallel.dispatcher=flex", "parallel.expert=2", "training.precision=bf16", "training.deterministic=true"],
            ["flex cannot be used with training.deterministic"],
        ),
        (
            ["parallel.dispatcher=flex", "parallel.expert=2", "training.precision=bf16", "model.hidden_size=36"],
            ["flex sends rows of a multiple of 8 numbers"],
        ),
        (
            ["parallel.overlap_dispatch=true", "parallel.dispatcher=allgather", "training.micro_batch_size=1"],
            ["parallel.overlap_dispatch", "hides the exchange of alltoall, not of allgather"],
        ),
        (
            ["parallel.overlap_dispatch=true", "training.recompute=full", "training.micro_batch_size=1"],
            ["cannot be used with training.recompute: full"],
        ),
        (["parallel.overlap_dispatch=true"], ["1 micro-batch(es)", "takes them two at a time"]),
    ],
)
def test_bad_input_is_one_line_with_status_2(tmp_path, change, words):
    write_corpora(tmp_path)
    status, said = run(tmp_path, *change)
    assert status == 2, said
    assert len(said.strip().splitlines()) == 1 and said.startswith("error: "), said
    for word in words:
        assert word in said
    if (tmp_path / "run").exists():  # it does from where the run file could be read
        assert outcome(tmp_path / "run")["code"] == 2 and said == f"error: {outcome(tmp_path / 'run')['reason']}\n"
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/config.yaml").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "asked, named",
    [
        (["training.kernels=transformer_engine"], "training.kernels: transformer_engine"),
        (["training.precision=fp8", "model.mlp.ffn_hidden_size=16"], "training.precision: fp8"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(tmp_path, asked, named):
    write_corpora(tmp_path)
    status, said = run(tmp_path, *asked)
    assert status == 2 and said.count("\n") == 1, said
    assert f"{named} needs a GPU, and this rank sees none" in said


def test_deep_ep_is_refused_where_it_is_not_installed(tmp_path):
    write_corpora(tmp_path)
    status, said = run(tmp_path, "parallel.dispatcher=flex", "parallel.expert=2", "training.precision=bf16")
    assert status == 2 and said.count("\n") == 1 and "parallel.dispatcher: flex needs DeepEP" in said, said


def test_a_token_id_over_the_vocabulary_names_its_corpus(tmp_path):
    write_corpora(tmp_path)  # without a manifest: found when a window with it is read
    status, said = run(tmp_path, "model.vocab_size=20")
    assert status == 2 and ".bin holds token id" in said and "20 ids" in said


def test_a_missing_corpus_names_source_and_path(tmp_path):
    write_corpora(tmp_path)
    (tmp_path / "code.bin").unlink()
    status, said = run(tmp_path)
    assert status == 2 and "code" in said and str(tmp_path / "code.bin") in said and len(said.strip().splitlines()) == 1


def test_a_time_limit_counts_from_the_start_of_the_process(tmp_path):
    write_corpora(tmp_path)
    # less than the imports take
    status, said = run(tmp_path, "training.max_wall_time=1s", "parallel.expert=1", nproc=1, fresh=True)
    assert status == 3, said
    assert outcome(tmp_path / "run")["step"] == 1 and "max_wall_time 1s" in outcome(tmp_path / "run")["reason"]


def test_another_model_in_the_same_folder_is_refused_with_both_values(cut):
    assert outcome(cut / "run")["code"] == 0
    status, said = run(cut, "model.hidden_size=32")
    # not the last start's success
    assert outcome(cut / "run")["code"] == 2 and "16 -> 32" in outcome(cut / "run")["reason"]
    assert status == 2 and "model.hidden_size 16 -> 32" in said and len(said.strip().splitlines()) == 1
    status, said = run(cut, "--resume", "never")
    assert status == 2 and "holds a run" in said


def test_a_refused_start_under_torchrun_leaves_an_outcome(tmp_path):
    import subprocess
    import sys

    from tests.integration.runs import ROOT

    write_corpora(tmp_path)
    (tmp_path / "code.bin").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "moe_train"]
    done = subprocess.run(
        [*command, "pretrain", str(tmp_path / "run.yaml"), "parallel.expert=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1  # torchrun's own: which is why launchers believe outcome.json
    assert outcome(tmp_path / "run")["code"] == 2 and "code.bin" in outcome(tmp_path / "run")["reason"]
