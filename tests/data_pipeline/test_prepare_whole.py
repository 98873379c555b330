"""A whole corpus: every kind of input, filters, duplicates, a shuffle in buckets, shards, and kills at any moment."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import assemble, encode, spool
from data_pipeline import prepare as module
from data_pipeline.documents import Document, RawDocument, RawReader
from data_pipeline.errors import DamagedDataError, DataError
from data_pipeline.filters import parse_filters
from data_pipeline.indexed import IndexedReader
from data_pipeline.mixture import MixtureConfig
from data_pipeline.prepare import prepare
from data_pipeline.sources import open_sources
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer
from tests.data_pipeline.corpora import text

TEXTS = [f"{number}: {text(number, 12 + number % 30)}" for number in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/0.jsonl ... 3.jsonl with TEXTS in order, and a tokenizer."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "raw").mkdir()
    for number in range(4):
        rows = [{"text": t, "meta": {"part": number}} for t in TEXTS[number * 100 : number * 100 + 100]]
        (folder / "raw" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer([folder / "raw"], folder / "tok.model", 400)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything small: many blocks, many buckets, buffers that overflow, a checkpoint after each block."""
    monkeypatch.setattr(encode, "BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(module, "BUCKET_BYTES", 10_000)
    monkeypatch.setattr(spool, "BUFFER_BYTES", 3000)
    monkeypatch.setattr(spool, "CHECKPOINT_SECONDS", 0.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(folder: Path, prefix: Path) -> list[str]:
    tokenizer, reader = load_tokenizer(folder / "tok.model"), IndexedReader(prefix)
    return [tokenizer.decode(reader.document(i)[:-1]) for i in range(reader.num_documents)]


def test_a_shuffle_keeps_every_document(folder: Path, tmp_path: Path, small: None) -> None:
    orders = {}
    for name, seed in (("a", 1), ("b", 2), ("again", 1)):
        prepare(folder / "raw", tmp_path / name, folder / "tok.model", shuffle_seed=seed)
        orders[name] = decoded(folder, tmp_path / name)
        assert Counter(orders[name]) == Counter(TEXTS)
    assert orders["a"] == orders["again"] != orders["b"]
    places = np.array([TEXTS.index(sample) for sample in orders["a"]])
    assert abs(np.corrcoef(places, np.arange(400))[0, 1]) < 0.2  # over the whole corpus, not near by
    assert np.mean(np.abs(np.diff(places))) > 100


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_bytes_for_any_workers(folder: Path, tmp_path: Path, small: None, workers: int) -> None:
    options = dict(holdout=0.2, shuffle_seed=5, dedup=True, shard_tokens=3000, filters=["meta.part!=2"])
    prepare(folder / "raw", tmp_path / "one" / "out", folder / "tok.model", **options)
    prepare(folder / "raw", tmp_path / "many" / "out", folder / "tok.model", workers=workers, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_shards_are_bounded_and_make_one_source(folder: Path, tmp_path: Path, small: None) -> None:
    prefix = tmp_path / "out"
    prepare(folder / "raw", prefix, folder / "tok.model", shuffle_seed=3, holdout=0.1)
    whole = IndexedReader(prefix)
    expected, held = whole.tokens(0, whole.num_tokens).copy(), (tmp_path / "out.heldout.bin").read_bytes()
    prepare(
        folder / "raw", prefix, folder / "tok.model", shuffle_seed=3, holdout=0.1, shard_tokens=2000, overwrite=True
    )
    assert not (tmp_path / "out.bin").exists() and (tmp_path / "out-00000.heldout.bin").read_bytes() == held
    shards = [IndexedReader(path) for path in sorted(tmp_path.glob("out-?????.bin"))]
    assert len(shards) > 3 and all(1500 < shard.num_tokens <= 2000 for shard in shards[:-1])
    assert np.array_equal(np.concatenate([shard.tokens(0, shard.num_tokens) for shard in shards]), expected)
    mixture = MixtureConfig(
        sequence_length=32,
        seed=0,
        tokenizer=str(folder / "tok.model"),
        sources={"web": {"paths": [str(tmp_path / "out-*.bin")]}},
        phases=[{"name": "a", "tokens": 3200, "weights": {"web": 1}}],
    )
    assert open_sources(mixture)["web"].num_tokens == len(expected)
    with pytest.raises(DataError, match="vocabulary has 300 ids"):  # the shared manifest is read
        open_sources(mixture, vocab_size=300)
    prepare(folder / "raw", prefix, folder / "tok.model", shuffle_seed=3, shard_tokens=9000, overwrite=True)
    names = {path.name for path in tmp_path.iterdir()}
    listed = json.loads((tmp_path / "out.manifest.json").read_text())["splits"]["train"]["files"]
    assert names == {*listed, "out.manifest.json"}  # nothing is left of more and smaller shards


def test_duplicates_go(folder: Path, tmp_path: Path, small: None) -> None:
    doubled = tmp_path / "doubled.jsonl"
    samples = [*TEXTS, *TEXTS[:50], *TEXTS[:50], TEXTS[0] + " "]
    doubled.write_text("".join(json.dumps({"text": sample}) + "\n" for sample in samples))
    report = prepare([doubled], tmp_path / "out", folder / "tok.model", dedup=True, shuffle_seed=0)
    assert report.duplicates == 100 and report.train.documents == 401
    assert Counter(decoded(folder, tmp_path / "out")) == Counter([*TEXTS, TEXTS[0] + " "])
    with pytest.raises(DataError, match="give a shuffle seed"):
        prepare([doubled], tmp_path / "other", folder / "tok.model", dedup=True)


def test_filters(folder: Path, tmp_path: Path) -> None:
    report = prepare(folder / "raw", tmp_path / "out", folder / "tok.model", filters=["meta.part>=1", "meta.part<3"])
    assert decoded(folder, tmp_path / "out") == TEXTS[100:300] and report.filtered == 200 and not report.bad
    (tmp_path / "x.txt").write_text("no fields")
    with pytest.raises(DataError, match="has no fields"):
        prepare([tmp_path / "x.txt"], tmp_path / "y", folder / "tok.model", filters=["a=1"])


@pytest.mark.parametrize(
    ("condition", "record", "accepted"),
    [
        ("lang=en", {"lang": "en"}, True), ("lang = en", {"lang": b"en"}, True), ("lang!=en", {"lang": "de"}, True),
        ("lang!=en", {}, False), ("n>1.5", {"n": 2}, True), ("n<1", {"n": "0"}, False), ("ok=true", {"ok": 1}, False),
        ("ok=true", {"ok": True}, True), ("a.b=1", {"a": {"b": 1}}, True), ("a.b=1", {"a.b": 1}, True),
        ('id="7"', {"id": "7"}, True), ("id=7", {"id": "7"}, False),
    ],
)  # fmt: skip
def test_a_filter(condition: str, record: dict, accepted: bool) -> None:
    assert parse_filters([condition])[0].accepts(record) is accepted


@pytest.mark.parametrize("nonsense", ["lang", "=en", "lang=", "lang~en", "ok<true", "a=[1]"])
def test_what_is_no_filter(nonsense: str) -> None:
    with pytest.raises(DataError, match="filter"):
        parse_filters([nonsense])


def test_zstd(folder: Path, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"text": sample}) + "\n" for sample in TEXTS).encode()
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(lines[:1000]) + compress(lines[1000:]))  # two frames
    prepare([tmp_path / "a.jsonl.zst"], tmp_path / "out", folder / "tok.model")
    assert decoded(folder, tmp_path / "out") == TEXTS
    (tmp_path / "cut.jsonl.zst").write_bytes(compress(lines)[:-20])
    with pytest.raises(DamagedDataError, match="cut.jsonl.zst: is damaged"):
        prepare([tmp_path / "cut.jsonl.zst"], tmp_path / "cut", folder / "tok.model")


def test_tables(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    raw = [sample.encode() for sample in TEXTS]
    raw[3], raw[5] = b"\xff\xfe", None
    strings = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"body": strings, "n": list(range(400)), "meta": [{"lang": "en"}] * 399 + [{"lang": "de"}]})
    good = [sample for number, sample in enumerate(TEXTS[:-1]) if number not in (3, 5) and number >= 2]
    (tmp_path / "parquet").mkdir()
    (tmp_path / "arrow").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "x.parquet", row_group_size=90)
    with pyarrow.ipc.new_stream(tmp_path / "arrow" / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, 150)
    (tmp_path / "arrow" / "cache-1.arrow").write_bytes(b"what a map left")
    for kind in ("parquet", "arrow"):
        report = prepare(
            tmp_path / kind,
            tmp_path / f"{kind}-out",
            folder / "tok.model",
            text_key="body",
            filters=["n>=2", "meta.lang=en"],
        )
        assert decoded(folder, tmp_path / f"{kind}-out") == good
        assert report.bad == {"invalid UTF-8": 1, "missing field": 1} and report.filtered == 3
        assert report.examples[0].endswith(":4: invalid UTF-8")
    with pytest.raises(DataError, match="has no column 'text'; it has body, n, meta: name one with --text-key"):
        prepare(tmp_path / "parquet", tmp_path / "none", folder / "tok.model")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is no table")
    with pytest.raises(DamagedDataError, match="bad.parquet: is damaged"):
        prepare([tmp_path / "bad.parquet"], tmp_path / "none", folder / "tok.model")


OPTIONS = dict(holdout=0.2, shuffle_seed=9, dedup=True, shard_tokens=4000, progress=False)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "LARGEST_RECORDS", 20 * spool.RECORD.itemsize)  # some buckets are split
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = (folder / "raw" / "0.jsonl").read_bytes(), (folder / "raw" / "1.jsonl").read_bytes()
    (raw / "0.jsonl").write_bytes(lines[0] * 2 + b"{broken\n")
    (raw / "1.jsonl.gz").write_bytes(gzip.compress(lines[1] * 3))
    (raw / "2.txt").write_text("one more\n")
    begun = time.monotonic()
    prepare(raw, tmp_path / "expected" / "out", folder / "tok.model", **OPTIONS)
    whole = time.monotonic() - begun
    expected = contents(tmp_path / "expected")

    context, moments = multiprocessing.get_context("fork"), random.Random(1)
    kills = resumed = 0
    out = tmp_path / "killed" / "out"
    while kills < 20:
        call = dict(workers=1 + kills % 2, **OPTIONS)
        process = context.Process(target=prepare, args=(raw, out, folder / "tok.model"), kwargs=call)
        process.start()
        process.join(moments.uniform(0, whole))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        resumed += (tmp_path / "killed" / "out.partial" / "state.json").exists()
        manifest = tmp_path / "killed" / "out.manifest.json"
        if manifest.exists():
            listed = json.loads(manifest.read_text())["splits"]["train"]["files"]
            assert all((tmp_path / "killed" / name).stat().st_size == f["bytes"] for name, f in listed.items())
        if process.exitcode in (0, 1):  # whole, or killed when it was whole: then it is there already
            assert contents(tmp_path / "killed") == expected
            for path in (tmp_path / "killed").iterdir():
                path.unlink()
    assert resumed > 5  # some of the kills left something to go on with
    try:
        prepare(raw, out, folder / "tok.model", **OPTIONS)
    except DataError as error:
        assert "is there already" in str(error)
    assert contents(tmp_path / "killed") == expected


def test_buckets_too_large_for_memory_are_split(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to single documents and into equal ones, with the bytes that one bucket gives."""
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text("".join(json.dumps({"text": sample}) + "\n" for sample in [*TEXTS, *TEXTS[:99], *TEXTS[:30]]))
    for dedup in (True, False):
        options = dict(shuffle_seed=4, dedup=dedup, shard_tokens=3000, holdout=0.1)
        prepare([doubled], tmp_path / f"whole{dedup}" / "out", folder / "tok.model", **options)
        monkeypatch.setattr(module, "BUCKET_BYTES", 1 << 30)
        monkeypatch.setattr(spool, "LARGEST_RECORDS", 3 * spool.RECORD.itemsize)
        largest, original = [], spool.Spool._parts

        def parts(self: spool.Spool, *args, original=original, largest=largest, **kwargs):
            for part in original(self, *args, **kwargs):
                largest.append(len(part[0]))
                yield part

        monkeypatch.setattr(spool.Spool, "_parts", parts)
        prepare([doubled], tmp_path / f"split{dedup}" / "out", folder / "tok.model", **options)
        monkeypatch.setattr(spool.Spool, "_parts", original)
        assert max(largest) <= 3
        assert contents(tmp_path / f"split{dedup}") == contents(tmp_path / f"whole{dedup}")


def test_without_a_shuffle_it_is_read_in_steps(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(folder / "raw", tmp_path / "whole" / "out", folder / "tok.model", shard_tokens=3000)
    monkeypatch.setattr(spool, "_STEP", 7)
    prepare(folder / "raw", tmp_path / "steps" / "out", folder / "tok.model", shard_tokens=3000)
    assert contents(tmp_path / "steps") == contents(tmp_path / "whole")


def test_the_last_step_goes_on_too(folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after every third bucket, and while shards get their names, it empties no bucket twice."""
    options = dict(shuffle_seed=4, shard_tokens=3000, holdout=0.1)
    prepare(folder / "raw", tmp_path / "whole" / "out", folder / "tok.model", **options)
    emptied: list[int] = []
    original, publish = spool.Spool.bucket, assemble.publish

    def bucket(self: spool.Spool, number: int):
        if len(emptied) % 4 == 3:
            emptied.append(-1)
            raise OSError(28, "No space left on device")
        emptied.append(number)
        return original(self, number)

    def named(prefix: str) -> None:
        publish(prefix)
        if len(list((tmp_path / "cut").glob("*.idx"))) == 2 and -2 not in emptied:
            emptied.append(-2)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.Spool, "bucket", bucket)
    monkeypatch.setattr(assemble, "publish", named)
    for _ in range(99):
        try:
            prepare(folder / "raw", tmp_path / "cut" / "out", folder / "tok.model", **options)
            break
        except DataError:
            pass
    buckets = [number for number in emptied if number >= 0]
    assert buckets == list(range(len(buckets))) and emptied.count(-1) >= 3 and emptied.count(-2) == 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_an_unfinished_corpus_of_other_options_is_not_gone_on_with(
    folder: Path, tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes((folder / "raw" / "0.jsonl").read_bytes() + b"{broken\n" * 3)
    for _ in range(2):
        with pytest.raises(DataError, match=r"bad.jsonl:102: malformed line; more than 1 bad documents"):
            prepare([bad], tmp_path / "out", folder / "tok.model", max_bad=1)
    with pytest.raises(DataError, match="unfinished corpus of other holdout and shuffle_seed; go on with those"):
        prepare([bad], tmp_path / "out", folder / "tok.model", holdout=0.1, shuffle_seed=2)
    with pytest.raises(DataError, match="unfinished corpus of other inputs; go on with those"):
        prepare([folder / "raw" / "1.jsonl"], tmp_path / "out", folder / "tok.model")
    prepare([bad], tmp_path / "out", folder / "tok.model", max_bad=3)
    assert "goes on after" in capsys.readouterr().err
    assert decoded(folder, tmp_path / "out") == TEXTS[:100] and not (tmp_path / "out.partial").exists()


def test_it_goes_on_where_nobody_reads_what_it_says(folder: Path, tmp_path: Path, small: None) -> None:
    bad, out, model = tmp_path / "bad.jsonl", tmp_path / "out", folder / "tok.model"
    bad.write_bytes((folder / "raw" / "0.jsonl").read_bytes() + b"{broken\n")
    with pytest.raises(DataError, match="more than 0 bad documents"):
        prepare([bad], out, model, shuffle_seed=0, max_bad=0)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "moe_train", "prepare", str(bad), "--out", str(out), "--tokenizer", str(model)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stderr=writer, timeout=60)
    os.close(writer)
    assert done.returncode == 0 and IndexedReader(out).num_documents == 100


@pytest.mark.parametrize("again", ["./raw/*.jsonl", "{folder}/raw", "raw/../raw"])
def test_the_inputs_may_be_named_in_another_way(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for path in (folder / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes())
    (raw / "2.jsonl").open("a").write("{broken\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="raw/2.jsonl:101: malformed line; more than 0 bad"):
        prepare(["raw/*.jsonl"], tmp_path / "out", folder / "tok.model", max_bad=0)
    assert prepare([again.format(folder=tmp_path)], tmp_path / "out", folder / "tok.model").train.documents == 400
    assert decoded(folder, tmp_path / "out") == TEXTS
    both = prepare(["raw", raw], tmp_path / "both", folder / "tok.model")
    assert both.train.documents == 400  # no file is read twice


@pytest.mark.parametrize("options", [{}, dict(shuffle_seed=9, holdout=0.2, dedup=True)])
def test_a_damaged_input_is_mended_and_the_rest_is_kept(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    monkeypatch.setattr(spool.Spool, "_saving", property(lambda _: 0.0, lambda *_: None), raising=False)  # each block
    raw, read = tmp_path / "raw", []
    raw.mkdir()
    for path in (folder / "raw").iterdir():
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    prepare(raw, tmp_path / "whole" / "out", folder / "tok.model", **options)
    first, victim = raw / "0.jsonl.gz", raw / "2.jsonl.gz"
    stat, whole = first.stat(), victim.read_bytes()
    spoilt = gzip.compress((folder / "raw" / "2.jsonl").read_bytes().replace(b"a", b"o"))
    victim.write_bytes(spoilt[:-50])  # what can be read of it is not what it should be, either

    def call() -> None:
        prepare(raw, tmp_path / "cut" / "out", folder / "tok.model", **options)

    with pytest.raises(DamagedDataError, match="2.jsonl.gz: is damaged .* fetch it again"):
        call()
    state = json.loads((tmp_path / "cut" / "out.partial" / "state.json").read_text())
    assert state["after"][0] == str(victim)
    os.utime(first, (1, 1))
    with pytest.raises(DataError, match="holds an unfinished corpus of other inputs"):  # not one that was read
        call()
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    victim.write_bytes(whole)
    original = RawReader._documents
    monkeypatch.setattr(RawReader, "_documents", lambda *args: read.append(args[1]) or original(*args))
    call()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and str(first) not in read


def test_a_reader_tells_when_it_cannot_go_on(folder: Path) -> None:
    with pytest.raises(DataError, match="/gone.jsonl: the unfinished corpus ends in it, but it is not among"):
        list(RawReader([folder / "raw" / "0.jsonl"], after=("/gone.jsonl", 3)))


def ends(call: Callable[[], object]) -> None:
    """The end of a process that calls, as the command's."""
    try:
        call()
    except KeyboardInterrupt:
        os._exit(130)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def test_a_worker_that_is_killed_ends_the_command_which_goes_on(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = dict(shuffle_seed=1, progress=False)
    prepare(folder / "raw", tmp_path / "expected" / "out", folder / "tok.model", **options)
    understand, killed = encode.understand, tmp_path / "killed"

    def kills(raw: RawDocument, *rest: object) -> Document:
        if raw.file.endswith("2.jsonl") and raw.line == 50 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return understand(raw, *rest)

    monkeypatch.setattr(encode, "understand", kills)
    call = partial(prepare, folder / "raw", tmp_path / "out" / "out", folder / "tok.model", workers=2, **options)
    process = multiprocessing.get_context("fork").Process(target=ends, args=(call,))
    process.start()
    process.join(60)
    process.kill()
    said = capfd.readouterr().err
    assert process.exitcode == 5 and killed.exists()
    assert said.startswith("error: a worker ended before its work did") and said.count("\n") == 1
    assert json.loads((tmp_path / "out" / "out.partial" / "state.json").read_text())["documents"] > 0
    call()
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_an_interrupt_ends_workers_in_the_middle_of_a_document(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def sleeps(raw: RawDocument, *_: object) -> Document:
        (tmp_path / f"{os.getpid()}.worker").touch()
        time.sleep(600)
        raise AssertionError(raw)

    monkeypatch.setattr(encode, "understand", sleeps)
    call = partial(prepare, folder / "raw", tmp_path / "out", folder / "tok.model", workers=2, progress=False)
    process = multiprocessing.get_context("fork").Process(target=ends, args=(call,))
    process.start()
    while len(list(tmp_path.glob("*.worker"))) < 2 and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    process.kill()
    assert process.exitcode == 130 and capfd.readouterr().err == ""
    for path in tmp_path.glob("*.worker"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.stem), 0)


def test_an_interrupt_after_the_last_block_counts(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = spool.Spool.save

    def interrupted(self: spool.Spool, complete: bool = False) -> None:
        save(self, complete)
        if complete:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(spool.Spool, "save", interrupted)
    call = partial(prepare, folder / "raw", tmp_path / "out", folder / "tok.model", workers=2, progress=False)
    process = multiprocessing.get_context("fork").Process(target=ends, args=(call,))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 130


def test_a_disk_that_fills_up_loses_nothing(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(folder / "raw", tmp_path / "expected" / "out", folder / "tok.model", shuffle_seed=1)
    original, calls = spool.Spool._flush, []

    def full(self: spool.Spool) -> None:
        calls.append(1)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        original(self)

    monkeypatch.setattr(spool.Spool, "_flush", full)
    with pytest.raises(DataError, match="out: cannot be written .No space left on device.; make room"):
        prepare(folder / "raw", tmp_path / "full" / "out", folder / "tok.model", shuffle_seed=1)
    prepare(folder / "raw", tmp_path / "full" / "out", folder / "tok.model", shuffle_seed=1)
    assert contents(tmp_path / "full") == contents(tmp_path / "expected")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot be written"):
        prepare(folder / "raw", tmp_path / "file" / "out", folder / "tok.model")
