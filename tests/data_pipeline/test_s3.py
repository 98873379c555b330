"""Sources on an object store: a real S3 server on loopback, answers that are spoilt on the way, and no token that
differs from what `prepare` wrote."""

from __future__ import annotations

import builtins
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from data_pipeline import catalogue, remote, s3
from data_pipeline.errors import DamagedDataError, DataError, StoreError
from data_pipeline.heldout import open_heldout
from data_pipeline.ledger import Ledger
from data_pipeline.loader import Loader
from data_pipeline.mixture import MixtureConfig, expand, load_mixture
from data_pipeline.prepare import prepare
from data_pipeline.sources import open_sources
from data_pipeline.stream import SampleStream
from data_pipeline.tokenizer import train_tokenizer
from tests.data_pipeline.corpora import text, write_corpus
from tests.data_pipeline.s3_server import Proxy, in_turns

pytest.importorskip("s3fs")
boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")

S = 32
PHASES = [
    {"name": "one", "tokens": S * 200, "weights": {"web": 3, "raw": 1}},
    {"name": "two", "tokens": S * 80, "weights": {"web": 1, "raw": 1}},
]


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    proxy.client = boto3.client("s3", endpoint_url=proxy.direct, **keys)
    s3._stores.clear()
    yield proxy
    s3._stores.clear()
    proxy.close()
    server.stop()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """web-*.bin in shards with a manifest and a held-out split; raw.bin without a manifest."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(120)))
    train_tokenizer([folder / "t.jsonl"], folder / "tok.model", 400)
    prepare([folder / "t.jsonl"], folder / "web", folder / "tok.model", shard_tokens=4000, holdout=0.1, shuffle_seed=1)
    write_corpus(folder / "raw", 3000, vocab=400)
    return folder


@pytest.fixture
def bucket(proxy: Proxy, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A client of the store, whose bucket ``data`` holds the corpus under ``c/``; a cold cache, short pauses."""
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "MOE_TRAIN_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(s3, "LONGEST_PAUSE", 0.05)
    remote._blocks.clear()
    client = proxy.client
    client.create_bucket(Bucket="data")
    for path in corpus.iterdir():
        if path.suffix in (".bin", ".idx", ".json"):
            client.upload_file(str(path), "data", f"c/{path.name}")
    proxy.heal()
    yield client
    proxy.heal()
    for item in client.list_objects_v2(Bucket="data").get("Contents", ()):
        client.delete_object(Bucket="data", Key=item["Key"])
    client.delete_bucket(Bucket="data")


@pytest.fixture
def new_client() -> Iterator[None]:
    """For tests that change how the store is reached: clients are made before and after."""
    s3._stores.clear()
    yield
    s3._stores.clear()


def mixture(web: str, raw: str, tokenizer: Path, **changes) -> MixtureConfig:
    values = {
        "sequence_length": S, "seed": 5, "tokenizer": str(tokenizer), "phases": PHASES,
        "sources": {"web": {"paths": [web]}, "raw": {"paths": [raw]}},
    }  # fmt: skip
    return MixtureConfig(**(values | changes))


@pytest.fixture
def there(corpus: Path) -> MixtureConfig:
    """The mixture whose sources are on the store."""
    return mixture("s3://data/c/web-*.bin", "s3://data/c/raw", corpus / "tok.model")


@pytest.fixture
def here(corpus: Path) -> MixtureConfig:
    """The same files on this machine."""
    return mixture(str(corpus / "web-*.bin"), str(corpus / "raw"), corpus / "tok.model")


def stream(config: MixtureConfig) -> SampleStream:
    sources = open_sources(config)
    return SampleStream(Ledger.start(config, sources), sources)


def small_blocks(corpus: Path, bucket, monkeypatch: pytest.MonkeyPatch, size: int = 1024) -> None:
    """Rewrite the manifest as if blocks were of `size` bytes, so that shards have several."""
    import base64

    import xxhash

    manifest = json.loads((corpus / "web.manifest.json").read_text())
    for split in manifest["splits"].values():
        for name, entry in split["files"].items():
            if name.endswith(".bin"):
                data = (corpus / name).read_bytes()
                hashes = [xxhash.xxh3_64_intdigest(data[i : i + size]) for i in range(0, len(data), size)]
                packed = b"".join(number.to_bytes(8, "little") for number in hashes)
                entry["blocks"] = {"bytes": size, "xxh3_64": base64.b64encode(packed).decode()}
    bucket.put_object(Bucket="data", Key="c/web.manifest.json", Body=json.dumps(manifest).encode())
    monkeypatch.setattr(remote, "BLOCK_BYTES", size)


def test_the_batches_are_those_of_local_files_and_a_resume_goes_on(
    bucket, there: MixtureConfig, here: MixtureConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(corpus, bucket, monkeypatch)
    local, distant = stream(here), stream(there)
    assert distant.sources["web"].fingerprint == local.sources["web"].fingerprint  # by the manifest: the same content
    assert distant.ahead and not local.ahead
    with Loader(local, 0, 8, 4) as loader:
        expected = list(loader)
    with Loader(distant, 0, 8, 4) as loader:
        assert np.array_equal(np.stack(list(loader)), np.stack(expected))
    remote._blocks.clear()  # another process, with the node's cache
    with Loader(stream(there), 120, 8, 4) as loader:
        assert np.array_equal(np.stack(list(loader)), np.stack(expected[30:]))
    ranks = [Loader(stream(there), 120, 8, 4, rank, 2) for rank in range(2)]
    assert all(np.array_equal(next(ranks[i % 2]), expected[30 + i]) for i in range(20))
    for loader in ranks:
        loader.close()
    moved = there.model_copy(update={"sources": {"web": there.sources["web"], "raw": here.sources["raw"]}})
    sources = open_sources(moved)
    assert SampleStream(local.ledger, sources).samples([3, 7]).tolist() == local.samples([3, 7]).tolist()


def test_a_block_is_fetched_once_a_node(
    bucket, proxy: Proxy, there: MixtureConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(corpus, bucket, monkeypatch)
    first, second = stream(there), stream(there)
    proxy.heal()
    for each in (first, second):
        each.samples(np.arange(each.num_samples))
    remote._blocks.clear()
    stream(there).samples(np.arange(first.num_samples))
    blocks = sum(-(-path.stat().st_size // 1024) for path in corpus.glob("*.bin") if "heldout" not in path.name)
    gets = sum(count for path, count in proxy.seen.items() if ".bin" in path)
    assert 0 < gets <= blocks


@pytest.mark.parametrize("fault", ["503", "reset", "truncated", "slow", "corrupt"])
def test_what_passes_is_tried_again(
    bucket, proxy: Proxy, there: MixtureConfig, here: MixtureConfig, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "slow":
        monkeypatch.setattr(s3, "ATTEMPT_SECONDS", 0.5)
    expected, distant = stream(here), stream(there)
    proxy.fault = in_turns(fault, fault, path=".bin")
    n = np.arange(expected.num_samples)
    assert np.array_equal(distant.samples(n), expected.samples(n))
    assert proxy.fault("x.bin") is None, "both faults were met"


def test_faults_at_random_and_many_readers(
    bucket, proxy: Proxy, there: MixtureConfig, here: MixtureConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the sources are opened; several threads read the same blocks, ahead and at once."""
    small_blocks(corpus, bucket, monkeypatch)
    random, lock = np.random.default_rng(0), threading.Lock()

    def fault(path: str) -> str | None:
        with lock:
            return ["503", "reset", "truncated"][int(random.integers(3))] if random.random() < 0.2 else None

    proxy.fault = fault
    expected, distant = stream(here), stream(there)
    loaders = [Loader(distant, 0, 8, 4, rank, 2) for rank in range(2)]
    for number in range(expected.num_samples // 8 * 2):
        wanted = expected.samples(np.arange(number * 4, number * 4 + 4))
        assert np.array_equal(next(loaders[number % 2]), wanted)
    for loader in loaders:
        loader.close()


def test_a_wrong_hash_is_an_error_and_never_data(bucket, proxy: Proxy, there: MixtureConfig, corpus: Path) -> None:
    distant = stream(there)
    proxy.fault = lambda path: "corrupt" if "web-00001.bin" in path else None
    with pytest.raises(
        DamagedDataError, match=r"s3://data/c/web-00001.bin: (bytes 0..\d+ have the hash|its content has not)"
    ) as info:
        with Loader(distant, 0, 8, 4) as loader:
            list(loader)
    assert info.value.exit_code == 4 and "\n" not in str(info.value)
    proxy.heal()
    data = bytearray((corpus / "web-00001.bin").read_bytes())
    data[1001] ^= 1  # changed on the store, the same size
    bucket.put_object(Bucket="data", Key="c/web-00001.bin", Body=bytes(data))
    with pytest.raises(DamagedDataError, match="web-00001.bin: bytes"):
        changed = stream(there)
        changed.samples(np.arange(changed.num_samples))
    bucket.put_object(Bucket="data", Key="c/web-00001.bin", Body=bytes(data[:-2]))
    with pytest.raises(DamagedDataError, match="source 'web': .*web-00001.bin has .* bytes, its manifest says"):
        stream(there)


def test_a_manifest_without_blocks_is_held_to_the_hash_of_the_whole(bucket, there: MixtureConfig, corpus: Path) -> None:
    manifest = json.loads((corpus / "web.manifest.json").read_text())
    for entry in manifest["splits"]["train"]["files"].values():
        entry.pop("blocks", None)
    bucket.put_object(Bucket="data", Key="c/web.manifest.json", Body=json.dumps(manifest).encode())
    stream(there)
    data = bytearray((corpus / "web-00000.bin").read_bytes())
    data[0] ^= 1
    bucket.put_object(Bucket="data", Key="c/web-00000.bin", Body=bytes(data))
    with pytest.raises(DamagedDataError, match="web-00000.bin: its content has the hash"):
        stream(there)


def test_an_object_replaced_during_a_run_is_damage(bucket, there: MixtureConfig, tmp_path: Path) -> None:
    distant = stream(there)
    write_corpus(tmp_path / "raw", 3000, seed=1, vocab=400)
    bucket.upload_file(str(tmp_path / "raw.bin"), "data", "c/raw.bin")
    with pytest.raises(DamagedDataError, match="s3://data/c/raw.bin: has been replaced since it was opened") as info:
        distant.samples(np.arange(distant.num_samples))
    assert info.value.exit_code == 4
    assert stream(there).sources["raw"].fingerprint != distant.sources["raw"].fingerprint


def test_a_store_that_does_not_answer(
    bucket, proxy: Proxy, there: MixtureConfig, new_client: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    distant = stream(there)
    monkeypatch.setattr(s3, "READING_SECONDS", 0.3)
    proxy.fault = lambda path: "503"
    with pytest.raises(StoreError, match=r"s3://data/c/.*.bin: cannot be read .status 503, \d+ tries") as info:
        distant.sample(0)
    assert info.value.exit_code == 5
    monkeypatch.setattr(s3, "OPENING_SECONDS", 0.3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3._stores.clear()
    with pytest.raises(StoreError, match="cannot be read .* tries in 0 s.*check AWS_ENDPOINT_URL") as info:
        stream(there)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("web", "part"),
    [
        ("s3://data/c/nothing-*.bin", "no .bin file matches s3://data/c/nothing"),
        ("s3://data/c/nothing", "there is no s3://data/c/nothing.bin"),
        ("s3://other/c/web-*.bin", "no such bucket"),
        ("gs://data/c/web-*.bin", "gs:// is not read; name s3://"),
        ("s3://data/c/web-00000.heldout.bin", "is held-out text"),
    ],
)
def test_mistakes(bucket, here: MixtureConfig, corpus: Path, web: str, part: str) -> None:
    with pytest.raises(DataError) as info:
        open_sources(mixture(web, str(corpus / "raw"), corpus / "tok.model"))
    assert part in str(info.value) and "\n" not in str(info.value) and info.value.exit_code == 2


@pytest.mark.parametrize(("address", "web"), [("ftp://x", "s3://data/c/web"), (None, "s3://No_bucket!/web")])
def test_what_no_try_can_mend_is_told_at_once(
    bucket, corpus: Path, new_client: None, monkeypatch: pytest.MonkeyPatch, address: str | None, web: str
) -> None:
    monkeypatch.setattr(s3, "OPENING_SECONDS", 0.2)
    if address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(DataError, match="check the path and AWS_ENDPOINT_URL") as info:
        open_sources(mixture(web, str(corpus / "raw"), corpus / "tok.model"))
    assert info.value.exit_code == 2 and "\n" not in str(info.value)


def test_no_credentials_and_no_s3fs(
    bucket, there: MixtureConfig, new_client: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(DataError, match="credentials") as info:
        open_sources(there)
    assert info.value.exit_code == 2 and "\n" not in str(info.value)
    original = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name == "s3fs":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    s3._stores.clear()
    with pytest.raises(DataError, match=r"need the package s3fs; install it with: pip install '.\[s3\]'"):
        open_sources(there)


def test_patterns_and_lists(bucket) -> None:
    for name in ("d/a-0.bin", "d/a-1.bin", "d/e/a-2.bin", "d/a-0.heldout.bin", "d/a-0.idx", "d/b+1.bin"):
        bucket.put_object(Bucket="data", Key=name, Body=b"")
    found = expand([
        "s3://data/d/a-*.bin", "s3://data/d/**/*.bin", "s3://data/d/a-[1-9].bin", "s3://data/d/b+1", "s3://data/d/a-?",
    ])  # fmt: skip
    names = [[url.removeprefix("s3://data/d/") for url in urls] for urls in found]
    assert names == [["a-0", "a-1"], ["a-0", "a-1", "b+1", "e/a-2"], ["a-1"], ["b+1"], []]


def test_keys_with_brackets_are_found_as_they_are_written(bucket) -> None:
    for name in ("d[1]/a-0.bin", "d[1]/a-[0].bin", "d1/a-1.bin"):
        bucket.put_object(Bucket="data", Key=name, Body=b"")
    found = expand(
        ["s3://data/d[1]/*.bin", "s3://data/d[1]/a-[0]", "s3://data/d[1]/a-[0].bin", "s3://data/d[0-9]/*.bin"]
    )
    assert [[url.removeprefix("s3://data/") for url in urls] for urls in found] == [
        ["d[1]/a-0", "d[1]/a-[0]"], ["d[1]/a-[0]"], ["d[1]/a-[0]"], ["d1/a-1"],
    ]  # fmt: skip


def test_opening_many_shards_takes_few_requests(
    bucket, proxy: Proxy, corpus: Path, there: MixtureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "_WORTH_SHARDS", 1)
    proxy.heal()
    open_sources(there)
    read = {path.partition("?")[0] for path in proxy.seen}
    assert read == {"/data/c/web.manifest.json", "/data/c/raw.idx"}  # no shard that the manifest knows
    proxy.heal()
    open_sources(there)
    assert not any(".bin" in path or ".idx" in path for path in proxy.seen)  # known by size and etag


def test_held_out_text(bucket, there: MixtureConfig, here: MixtureConfig) -> None:
    local, distant = open_heldout(here)["web"], open_heldout(there)["web"]
    assert np.array_equal(local.windows(9), distant.windows(9)) and local.num_windows == distant.num_windows
    assert local.unigram_entropy == distant.unigram_entropy and set(open_heldout(there)) == {"web"}


def test_the_commands_work_on_a_store(bucket, corpus: Path, tmp_path: Path) -> None:
    from moe_train.cli import app

    phases = json.dumps(PHASES)
    (tmp_path / "mix.yaml").write_text(
        f"sequence_length: {S}\nseed: 5\ntokenizer: {corpus}/tok.model\nphases: {phases}\n"
        "sources: {web: {paths: ['s3://data/c/web-*.bin']}, raw: {paths: [s3://data/c/raw.bin]}}\n"
    )
    assert load_mixture(tmp_path / "mix.yaml").sources["raw"].paths == ["s3://data/c/raw.bin"]
    shown = CliRunner().invoke(app, ["mix", str(tmp_path / "mix.yaml"), "--json"])
    assert shown.exit_code == 0 and json.loads(shown.output)["samples"] == 280
    command = ["pretrain", "demo", "--dry-run", f"data.mixture={tmp_path}/mix.yaml", f"output_dir={tmp_path}/run"]
    checked = CliRunner().invoke(app, [*command, "schedule.warmup=1K", "schedule.decay=1K"])
    assert checked.exit_code == 0 and "dry run: config, mixture and layout agree" in checked.output, checked.output
