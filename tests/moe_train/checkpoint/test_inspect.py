"""What `moe-train checkpoint list` and `verify` say."""

from __future__ import annotations

import json

import pytest

from moe_train.checkpoint import inspect
from moe_train.checkpoint.coverage import what_is_not_covered
from moe_train.checkpoint.folder import remove
from moe_train.checkpoint.inspect import list_checkpoints, verify
from moe_train.checkpoint.manifest import check_files
from moe_train.checkpoint.reader import read_metadata
from moe_train.checkpoint.retention import is_verified
from moe_train.errors import DamagedError, UserError
from tests.moe_train.checkpoint.conftest import MODEL


def listed(run, capsys) -> dict[str, dict]:
    list_checkpoints(run, as_json=True)
    return {each["checkpoint"]: each for each in json.loads(capsys.readouterr().out)}


def test_list_tells_whole_from_damaged_from_verified(run, capsys) -> None:
    verify(run / "checkpoints" / "iter_0000100")
    (run / "checkpoints" / "iter_0000200" / "__0_0.distcp").write_bytes(b"short")
    capsys.readouterr()
    found = listed(run, capsys)
    assert [found[name]["state"] for name in sorted(found)] == ["verified", "damaged", "complete"]
    assert found["iter_0000200"]["fault"].startswith("__0_0.distcp has 5 bytes")
    newest = found["iter_0000300"]
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "iter_0000300").iterdir())
    manifest = sum(
        (run / "checkpoints" / "iter_0000300" / name).stat().st_size for name in ("manifest.json", "manifest.json.xxh3")
    )
    assert (newest["step"], newest["tokens"], newest["bytes"]) == (300, 300_000, size - manifest)
    assert newest["age_seconds"] < 60


def test_list_for_people(run, capsys) -> None:
    assert list_checkpoints(run) == 0
    text = capsys.readouterr().out
    assert "iter_0000300" in text and "300" in text and "complete" in text


def test_verify_all_goes_on_to_the_last(run, capsys) -> None:
    folder = run / "checkpoints"
    (folder / "iter_0000100" / "run_state.json").unlink()
    (folder / "iter_0000200" / "manifest.json").write_text("{}")
    with pytest.raises(DamagedError, match="iter_0000100: run_state.json is missing; .*iter_0000200"):
        verify(run, every=True)
    assert "iter_0000300: 3 files are as written" in capsys.readouterr().out
    assert is_verified(folder / "iter_0000300") and not is_verified(folder / "iter_0000200")


def test_what_goes_while_it_is_verified_is_not_damaged(run, capsys, monkeypatch) -> None:
    """Retention of a run that is on."""
    folder = run / "checkpoints"

    def meanwhile(path, entries):
        remove(folder / "iter_0000200")
        monkeypatch.undo()
        return check_files(path, entries)

    monkeypatch.setattr(inspect, "check_files", meanwhile)
    assert verify(run, every=True) == 0
    said = capsys.readouterr().out
    assert "iter_0000200 was removed meanwhile" in said and "iter_0000300: 3 files are as written" in said


def test_nothing_to_list(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no checkpoints"):
        list_checkpoints(tmp_path)
    (tmp_path / "checkpoints" / "iter_0000008.damaged").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoints; set aside are iter_0000008.damaged"):
        verify(tmp_path, every=True)


@pytest.fixture
def metadata(run):
    return read_metadata(run / "checkpoints" / "iter_0000300")


def test_a_whole_model_is_covered(metadata) -> None:
    assert what_is_not_covered(metadata, MODEL) is None


def test_what_is_not_covered_is_named(metadata) -> None:
    stored = metadata.state_dict_metadata
    chunks = stored["weights.embedding.weight"].chunks
    chunks.append(chunks[0])
    assert what_is_not_covered(metadata, MODEL).startswith("weights.embedding.weight: the rectangle at (0, 0)")
    chunks.clear()
    assert what_is_not_covered(metadata, MODEL) == "weights.embedding.weight: 28 of 28 elements are not covered"
    stored["exp_avg.embedding.weight"] = stored.pop("weights.embedding.weight")
    assert what_is_not_covered(metadata, MODEL) == "weights.embedding.weight is missing"


def test_a_moment_of_one_parameter_is_missing(metadata) -> None:
    stored = metadata.state_dict_metadata
    stored |= {f"exp_avg.{key[8:]}": value for key, value in list(stored.items())}
    assert what_is_not_covered(metadata, MODEL) is None
    del stored["exp_avg.final_norm.weight"]
    assert what_is_not_covered(metadata, MODEL) == "exp_avg.final_norm.weight is missing"
    del stored["weights.final_norm.weight"]


def test_another_model_is_not_covered(metadata) -> None:
    other = MODEL.model_copy(update={"vocab_size": 8})
    assert "has the shape (7, 4), the model in run_state.json (8, 4)" in what_is_not_covered(metadata, other)
