"""Copies of checkpoints in a second place: another file system, or an object store that fsspec knows. Needs
no torch.

A copy is made of committed checkpoints, in a thread of rank 0, while training goes on. Its hash of the
manifest is written last, after every file was read back and compared: an object store has no rename, so that
is what makes a copy whole. When the run's own disk is gone, the newest whole copy is fetched. The lines of
metrics.jsonl up to then come along.

Runs whose folders have the same name would share a place. The first copy leaves the path of its run there, and
a run of another path is refused."""

from __future__ import annotations

import posixpath
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import xxhash

from moe_train.checkpoint.config import CheckpointConfig
from moe_train.checkpoint.folder import WRITING, commit, is_checkpoint_name, step_of
from moe_train.checkpoint.manifest import MANIFEST, MANIFEST_HASH, check_files, flush, read_manifest
from moe_train.errors import DamagedError, UserError

METRICS = "metrics.jsonl"
RUN = "run_folder.txt"
"""Beside the copies: the absolute path of the folder of the run that they are of."""
_BLOCK = 1 << 23


class Mirror:
    """The second place.

    Args:
        url: a folder, or what fsspec takes (``s3://bucket/run``; its package for that store must be
            installed).
        keep_last: copies that stay there.
        run: the folder of the run whose copies they are.

    Raises:
        UserError: no such kind of store is known, or its package is missing.
    """

    def __init__(self, url: str, keep_last: int, run: Path):
        import fsspec

        self.url, self.keep_last, self._run = url, keep_last, run.resolve()
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoint.copy_to: {url}: {error}") from None

    def copies(self) -> list[str]:
        """The names of what is there, whole or not, oldest first."""
        try:
            found = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = {posixpath.basename(path.rstrip("/")) for path in found}
        return sorted((name for name in names if is_checkpoint_name(name)), key=lambda name: step_of(Path(name)))

    def check(self) -> bool:
        """Whether the place is known to be this run's; False where no run has left its path there yet.

        Raises:
            UserError: it is another run's.
            OSError, or what the store raises: it cannot be reached.
        """
        self._files.invalidate_cache()
        try:
            recorded = self._files.cat_file(posixpath.join(self._root, RUN)).decode("utf-8", "replace").strip()
        except FileNotFoundError:
            return False
        if recorded and recorded != str(self._run):
            raise UserError(
                f"checkpoint.copy_to: {self.url} has the copies of the run in {recorded}, not of {self._run}: give this"
                f" run a folder of another name or another copy_to, remove {self.url} if nobody needs it, or only"
                f" {posixpath.join(self.url, RUN)} if it is the same run, moved"
            )
        return bool(recorded)

    def push(self, path: Path) -> None:
        """Copy a committed checkpoint, read every file back, and only then make it a whole one.

        Raises:
            DamagedError: what is read back is not what was written.
            UserError: the place is another run's; nothing there was touched.
            OSError: it cannot be written.
        """
        if not self.check():
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(posixpath.join(self._root, RUN), f"{self._run}\n".encode())
        there, entries = self._at(path.name), read_manifest(path)
        for name in self.copies():  # half a copy, whose room this one may need, or one of a part that is computed again
            if name == path.name or not self._is_whole(name):
                self._files.rm(self._at(name), recursive=True)
        self._files.makedirs(there, exist_ok=True)
        for name in (*entries, MANIFEST):
            self._files.put_file(str(path / name), posixpath.join(there, name))
        for name, entry in entries.items():
            if self._hash(posixpath.join(there, name)) != entry["xxh3_128"]:
                raise DamagedError(f"{there}/{name} is not what was copied there")
        metrics = path.parent.parent / METRICS
        if metrics.exists():  # every line up to this checkpoint is in it
            self._files.put_file(str(metrics), posixpath.join(there, METRICS))
        self._files.put_file(str(path / MANIFEST_HASH), posixpath.join(there, MANIFEST_HASH))

    def prune(self, newest: str) -> None:
        """Remove all but ``newest``, which was just copied, and the whole ones before it, ``keep_last`` in all.

        Copies of later steps go too: the run went back, and the part that it gave up must not be fetched."""
        names = self.copies()
        until = [name for name in names if step_of(Path(name)) <= step_of(Path(newest)) and self._is_whole(name)]
        for name in names:
            if name not in until[-self.keep_last :]:
                self._files.rm(self._at(name), recursive=True)

    def fetch(self, folder: Path) -> Path | None:
        """Bring the newest copy that is whole into ``folder``, as a checkpoint like any other; None where
        there is none.

        Raises:
            DamagedError: there are copies, but none is whole.
            UserError: they are another run's.
        """
        self.check()
        faults = []
        for name in reversed(self.copies()):
            if not self._is_whole(name):
                continue
            writing = folder / f"{name}{WRITING}.copy"
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
            try:
                for each in (MANIFEST, MANIFEST_HASH):
                    self._files.get_file(posixpath.join(self._at(name), each), str(writing / each))
                entries = read_manifest(writing)
                for each in entries:
                    self._files.get_file(posixpath.join(self._at(name), each), str(writing / each))
                    flush(writing / each)
                fault = check_files(writing, entries)
            except (DamagedError, OSError) as error:
                fault = str(error)
            if fault is None:
                self._fetch_metrics(name, folder.parent / METRICS)
                commit(folder / name, writing)
                return folder / name
            shutil.rmtree(writing, ignore_errors=True)
            faults.append(f"{name}: {fault}")
        if faults:
            raise DamagedError(f"{self.url} holds no copy that is whole ({'; '.join(faults)})")
        return None

    def _fetch_metrics(self, name: str, target: Path) -> None:
        """The lines that were there when the copy was made, unless there are some here."""
        there = posixpath.join(self._at(name), METRICS)
        if not target.exists() and self._files.exists(there):
            part = target.with_suffix(".part")
            self._files.get_file(there, str(part))
            part.rename(target)

    def _at(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def _is_whole(self, name: str) -> bool:
        """Of a copy that is there. Raises what the store raises: that it does not answer makes no copy half a one."""
        return any(posixpath.basename(path) == MANIFEST_HASH for path in self._files.ls(self._at(name), detail=False))

    def _hash(self, path: str) -> str:
        self._files.invalidate_cache()
        digest = xxhash.xxh3_128()
        with self._files.open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()


def open_mirror(config: CheckpointConfig, run: Path) -> Mirror | None:
    """The second place of the run in the folder ``run``: below ``copy_to``, under its name; None where there
    is none.

    Raises:
        UserError: it cannot be used, or is another run's.
    """
    if config.copy_to is None:
        return None
    mirror = Mirror(posixpath.join(config.copy_to, run.resolve().name), config.copy_keep_last, run)
    try:
        mirror.check()
    except UserError:
        raise
    except Exception:
        pass  # no answer (each store has its own errors): whoever fetches or copies asks again and says so
    return mirror


class Mirroring:
    """Copies checkpoints one after another in the background; when it falls behind, it goes on with the
    newest.

    Args:
        report: called from the thread after each copy with the checkpoint, and with what went wrong or None.
    """

    def __init__(self, mirror: Mirror, report: Callable[[Path, str | None], None]):
        self._mirror, self._report = mirror, report
        self._wake, self._next, self._current = threading.Condition(), None, None
        self._thread: threading.Thread | None = None

    @property
    def in_use(self) -> set[Path]:
        """Checkpoints that must not be removed yet."""
        with self._wake:
            return {path for path in (self._next, self._current) if path is not None}

    def submit(self, path: Path) -> None:
        """Copy ``path`` when the one before is done."""
        with self._wake:
            self._next = path
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="copying checkpoints", daemon=True)
                self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Until nothing is left to copy; False when that takes longer than ``seconds``."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        return not self.in_use

    def _work(self) -> None:
        while True:
            with self._wake:
                self._current, self._next = self._next, None
                if self._current is None:
                    self._thread = None
                    return
            path = self._current
            try:
                self._mirror.push(path)
                self._mirror.prune(path.name)
                self._report(path, None)
            except Exception as error:  # the run goes on with what it has on its own disk
                self._report(path, str(error) or type(error).__name__)
