"""Who may write a run's folder: the newest start, and no hung one of the same job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe_train.errors import UserError
from moe_train.training import run
from moe_train.training.fence import OWNER, Fence, FencedError, held_before, taken_over
from moe_train.training.run_folder import RunFolder, now


def test_the_first_start_has_no_predecessor(tmp_path) -> None:
    fence = Fence.take(tmp_path / "run", {})
    assert fence.previous is None and fence.owner.number == 1
    fence.check()


def test_a_second_start_takes_the_folder_and_the_first_notices(tmp_path) -> None:
    first = Fence.take(tmp_path, {})
    second = Fence.take(tmp_path, {"SLURM_JOB_ID": "77"})
    second.check()
    assert second.previous == first.owner
    with pytest.raises(
        FencedError, match=r"start 2 \(job 77, restart 0, process \d+ on .*this one \(1\) ends"
    ) as caught:
        first.check()
    assert caught.value.exit_code == 6


def test_an_earlier_incarnation_of_the_same_job_stays_out(tmp_path) -> None:
    later = Fence.take(tmp_path, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"})
    with pytest.raises(FencedError, match=r"came after this one \(restart 1\)"):
        Fence.take(tmp_path, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"})
    later.check()
    assert Fence.take(tmp_path, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "3"}).owner.number == 2
    assert Fence.take(tmp_path, {"SLURM_JOB_ID": "78"}).owner.number == 3  # another job knows what it does


def test_a_dead_owner_is_known_as_such(tmp_path) -> None:
    program = (
        "import sys, pathlib; from moe_train.training.fence import Fence; Fence.take(pathlib.Path(sys.argv[1]), {})"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=30)
    fence = Fence.take(tmp_path, {})
    assert fence.owner.number == 2 and not fence.previous.may_be_alive()
    assert fence.owner.may_be_alive()
    assert replace(fence.previous, host="elsewhere").may_be_alive()  # nobody can tell from here
    assert not replace(fence.owner, born=fence.owner.born + 1).may_be_alive()  # another process has its id now


def test_who_ended_says_so(tmp_path) -> None:
    first = Fence.take(tmp_path, {})
    first.release()
    second = Fence.take(tmp_path, {})
    assert second.previous.number == 1 and not second.previous.may_be_alive()
    first.release()  # it is not its own any more
    second.check()


@pytest.mark.parametrize("content", [None, "", "[]", '{"number": 1}'])
def test_a_lost_or_torn_file_takes_the_folder_from_nobody(tmp_path, content) -> None:
    fence = Fence.take(tmp_path, {})
    (tmp_path / OWNER).unlink() if content is None else (tmp_path / OWNER).write_text(content)
    fence.check()
    assert Fence.take(tmp_path, {}).owner.number == 1


def test_many_starts_at_once_get_different_numbers(tmp_path) -> None:
    with ThreadPoolExecutor(8) as pool:
        fences = list(pool.map(lambda _: Fence.take(tmp_path, {}), range(24)))
    assert sorted(fence.owner.number for fence in fences) == list(range(1, 25))
    last = max(fences, key=lambda fence: fence.owner.number)
    last.check()
    for fence in fences:
        if fence is not last:
            with pytest.raises(FencedError):
                fence.check()


def test_the_process_above_the_ranks_knows_whose_outcome_it_is(tmp_path) -> None:
    since = now()
    Fence.take(tmp_path, {})
    assert not taken_over(tmp_path, since)  # by itself
    owner = json.loads((tmp_path / OWNER).read_text())
    (tmp_path / OWNER).write_text(json.dumps({**owner, "pid": 1, "parent": os.getpid()}))
    assert not taken_over(tmp_path, since)  # by its own rank
    (tmp_path / OWNER).write_text(json.dumps({**owner, "pid": 1}))
    assert taken_over(tmp_path, since)
    (tmp_path / OWNER).write_text(json.dumps({**owner, "started": "2000-01-01T00:00:00.000+00:00"}))
    assert not taken_over(tmp_path, since)  # of an earlier start: its own ranks did not get as far


def test_an_error_of_a_start_that_was_overtaken_is_that_it_was(tmp_path, monkeypatch) -> None:
    """By the owner's number: the clock may have been set back."""

    def overtaken(*_) -> int:
        Fence.take(tmp_path, {})
        raise UserError("the checkpoint to resume from is gone by now")

    monkeypatch.setattr(run, "_train_as_owner", overtaken)
    with pytest.raises(FencedError, match="was taken over by start 2"):
        run._train(SimpleNamespace(output_dir=tmp_path), SimpleNamespace(rank=0), "auto", [], None, now())


def test_who_never_took_the_folder_knows_whether_somebody_is_at_work_there(tmp_path) -> None:
    assert not held_before(tmp_path, now(), {})  # nobody ever was
    owner = Fence.take(tmp_path, {"SLURM_JOB_ID": "77"}).owner

    def held(job: str | None = None, since: str = "2999", **differently: object) -> bool:
        (tmp_path / OWNER).write_text(json.dumps({**vars(owner), **differently}))
        return held_before(tmp_path, since, {"SLURM_JOB_ID": job} if job else {})

    assert held() and held("78") and held(host="elsewhere")
    assert not held("77") and not held("77", host="elsewhere")  # by an earlier incarnation of the same job
    assert not held(since=owner.started)  # since this one began: by its own first rank
    assert not held(born=owner.born + 1) and not held(ended=now())
    RunFolder(tmp_path).start("")
    assert held()
    RunFolder(tmp_path).finish(5, "lost a rank")  # as whoever saw it end says, though it could not
    assert not held() and not held(host="elsewhere")
    assert held(started="2998")  # that was told of an earlier one: this one is loading
