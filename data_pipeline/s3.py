"""Objects on an S3-compatible store, by listings and byte ranges, through s3fs.

Address and credentials come from the usual AWS environment (AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, an
instance's role, ...). Whatever may pass is tried again with growing pauses: a connection refused or reset, a
timeout, a body cut short, 408, 429 and 5xx. What cannot pass is an error at once: no such bucket, no permission, no
credentials. Every read names the version (etag) it wants: an object replaced meanwhile is damage, not data.
"""

from __future__ import annotations

import asyncio
import glob
import itertools
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from data_pipeline.errors import DamagedDataError, DataError, StoreError

Result = TypeVar("Result")

OPENING_SECONDS = 20.0
"""How long listings and small reads are tried: whoever mistyped an address is waiting."""
READING_SECONDS = 300.0
"""How long a block of tokens is tried: a run outlives an outage of minutes."""
ATTEMPT_SECONDS = 30.0
"""After which one try at a megabyte or less is given up as stuck; larger reads have more."""
SPOILT_TRIES = 3
"""How often content whose checksum or hash does not hold is fetched before it is called damaged."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0
_SLOWEST = 100_000  # bytes/s; slower than this, another connection is worth trying
_CONNECTIONS = 32
_PASSING = {408, 425, 429}


class ObjectStore:
    """One process's way to the store. Safe to use from several threads.

    What listings said of objects is remembered: `find` asks anew, `facts` answers from the newest listing that covers
    an object, until `forget`.
    """

    def __init__(self) -> None:
        try:
            import fsspec.asyn
            import s3fs
        except ImportError:
            raise DataError(
                "paths of the form s3://... need the package s3fs; install it with: pip install '.[s3]'"
            ) from None
        self._sync = fsspec.asyn.sync
        config = {
            "retries": {"total_max_attempts": 1},  # tried again here, where it is known for how long
            "connect_timeout": 10,
            "read_timeout": ATTEMPT_SECONDS,
            "max_pool_connections": _CONNECTIONS,
        }
        self._files = s3fs.S3FileSystem(config_kwargs=config, skip_instance_cache=True, use_listings_cache=False)
        self._files.retries = 1
        self._serial = itertools.count()
        self._listings: dict[str, tuple[int, dict[str, tuple[int, str]]]] = {}

    def forget(self) -> None:
        """Forget every listing."""
        self._listings.clear()

    # --- what there is

    def find(self, path: str) -> list[str]:
        """The objects that `path` (a URL, or a pattern of them) stands for, sorted."""
        if not glob.has_magic(path):
            return [path] if path in self._list(path.removesuffix(".bin")) else []  # with what lies beside a shard
        there = self._list(re.split(r"[*?\[]", path)[0])
        if literal := [url for url in (path, path + ".bin") if url in there]:
            return literal[:1]
        folders = (path[: slash.end()] for slash in re.finditer("/", path))
        folder = max((each for each in folders if any(url.startswith(each) for url in there)), key=len, default="")
        wanted = re.compile(re.escape(folder) + _translated(path[len(folder) :]))
        return sorted(url for url in there if wanted.fullmatch(url))

    def facts(self, url: str) -> tuple[int, str] | None:
        """Size and etag of an object, or None; by the last listing that covers it."""
        heads = (url[:end] for end in range(len(url), 0, -1))
        listings = [listing for head in heads if (listing := self._listings.get(head))]
        newest = max(listings, key=lambda listing: listing[0])[1] if listings else self._list(url)
        return newest.get(url)

    def _list(self, head: str) -> dict[str, tuple[int, str]]:
        """Every object whose URL begins with `head`."""
        bucket, prefix = _split(head)

        async def page(token: str | None) -> dict[str, Any]:
            more = {"ContinuationToken": token} if token else {}
            return await self._files._call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)

        found: dict[str, tuple[int, str]] = {}
        token = None
        while True:
            answer = self._tried(head, lambda token=token: page(token), OPENING_SECONDS)
            for item in answer.get("Contents", ()):
                found[f"s3://{bucket}/{item['Key']}"] = item["Size"], _quoted(item["ETag"])
            token = answer.get("NextContinuationToken")
            if not token:
                break
        self._listings[head] = next(self._serial), found
        return found

    # --- what is in it

    def read(self, url: str, start: int, stop: int, version: str, seconds: float | None = None) -> bytes:
        """Bytes [start, stop) of an object, which must still have the etag `version`.

        Raises DamagedDataError when it has been replaced or cut, StoreError when the store does not answer for
        `seconds` (default: OPENING_SECONDS).
        """
        bucket, key = _split(url)

        async def get() -> bytes:
            answer = await self._files._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", IfMatch=version
            )
            try:
                data = await answer["Body"].read()
            finally:
                answer["Body"].close()
            if _quoted(answer.get("ETag", version)) != version:  # a store that knows no If-Match
                raise _Replaced
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came of {stop - start}")
            return data

        limit = ATTEMPT_SECONDS + max(0, stop - start - (1 << 20)) / _SLOWEST
        return self._tried(url, get, OPENING_SECONDS if seconds is None else seconds, limit)

    def _tried(
        self, url: str, call: Callable[[], Awaitable[Result]], seconds: float, limit: float | None = None
    ) -> Result:
        """The result of `call`, tried again for `seconds` as long as what goes wrong may pass."""
        begun, pause, tries = time.monotonic(), FIRST_PAUSE, 0

        async def attempt() -> Result:
            return await asyncio.wait_for(call(), limit or ATTEMPT_SECONDS)

        while True:
            tries += 1
            try:
                return self._sync(self._files.loop, attempt)
            except Exception as error:
                reason = _judged(url, error, tries)
            left = begun + seconds - time.monotonic()
            if left <= 0:
                raise StoreError(
                    f"{url}: cannot be read ({reason}, {tries} tries in {seconds:.0f} s); start again when "
                    "the store answers, and check AWS_ENDPOINT_URL"
                )
            time.sleep(min(left, pause * random.uniform(0.5, 1.0)))  # not all ranks at once
            pause = min(2 * pause, LONGEST_PAUSE)


class _Replaced(Exception):
    """The object is another one than was listed."""


def _judged(url: str, error: Exception, tries: int) -> str:
    """Why another try may help, in a few words; raises an error of ours where none will."""
    cause: BaseException = error
    while cause.__cause__ is not None and not hasattr(cause, "response"):
        cause = cause.__cause__
    response = getattr(cause, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    if isinstance(error, _Replaced) or status in (412, 416):
        raise DamagedDataError(
            f"{url}: has been replaced since it was opened; put the old content back, or give the new one a new name"
        ) from None
    if status is not None:
        if status >= 500 or status in _PASSING or code in ("RequestTimeout", "SlowDown"):
            return f"status {status}"
        if status == 404:
            what = "no such bucket" if code == "NoSuchBucket" else "no such object"
            raise DataError(f"{url}: cannot be read ({what}); check the path and AWS_ENDPOINT_URL") from None
        told = " ".join(f"{code} {response.get('Error', {}).get('Message', '')}".split()) or f"status {status}"
        raise DataError(f"{url}: cannot be read ({told}); check the AWS credentials and what they permit") from None
    name = type(cause).__name__
    if name == "FlexibleChecksumError":  # botocore compares whole objects with the checksum that the store keeps
        if tries >= SPOILT_TRIES:
            raise DamagedDataError(
                f"{url}: its content has not the checksum that the store keeps; copy it again"
            ) from None
        return "wrong checksum"
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return "no answer in time"
    told = " ".join(str(error).split()) or name
    if "Credential" in name or "Profile" in name or "Token" in name or "SSO" in name or isinstance(error, ValueError):
        raise DataError(f"{url}: cannot be read ({told}); set AWS_PROFILE or the AWS_* variables") from None
    if name in ("ParamValidationError", "EndpointResolutionError"):
        raise DataError(f"{url}: cannot be read ({told}); check the path and AWS_ENDPOINT_URL") from None
    if isinstance(error, (TypeError, AttributeError, NameError, KeyError)):
        raise error  # a bug, which no try will mend
    return told


def _quoted(etag: str) -> str:
    """An etag as requests want it; not every store says it so."""
    return '"' + etag.strip('"') + '"'


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{url}: names no bucket; write s3://bucket/key")
    return bucket, key


def _translated(pattern: str) -> str:
    """A glob over URLs as a regular expression: ``*`` and ``?`` stay within a level, ``**`` is any number of them."""
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^]]*\]|.", pattern, re.DOTALL)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(known.get(part) or _literal(part) for part in parts)


def _literal(part: str) -> str:
    if len(part) == 1:
        return re.escape(part)
    inside = part[1:-1].replace("\\", "\\\\")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"


def forget() -> None:
    """Forget what this process's listings said, if there were any."""
    if os.getpid() in _stores:
        _stores[os.getpid()].forget()


_stores: dict[int, ObjectStore] = {}
_making = threading.Lock()


def store() -> ObjectStore:
    """This process's way to the store (a forked one needs its own)."""
    with _making:
        if os.getpid() not in _stores:
            _stores.clear()
            _stores[os.getpid()] = ObjectStore()
        return _stores[os.getpid()]
