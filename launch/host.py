"""One machine's ranks of a run that `moe-train launch hostfile` starts. What that one says comes on stdin.

``stop``: the ranks save and end. ``kill``: they end. The end of stdin (the connection has gone, or the launcher): they
save, and are killed if that takes too long: nothing is left behind on a machine that nobody looks after.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from moe_train.config import load_run
from moe_train.training.run import rank_target
from parallel.rank_env import RankEnv
from parallel.spawn import REPEAT_SECONDS, spawn_ranks, tell

SAVE_SECONDS = 300.0
"""For a last checkpoint, after the connection has gone."""


def main(arguments: Sequence[str] = sys.argv[1:]) -> int:
    """Start the ranks and wait for them; their exit status."""
    asked = json.loads(arguments[0])
    folder = f"output_dir={json.dumps(asked['output_dir'], ensure_ascii=False)}"
    config = load_run(asked["run"], [*asked["overrides"], folder])
    first = RankEnv(asked["first_rank"], asked["world_size"], 0, asked["ranks"], asked["address"], asked["port"], "env")
    threading.Thread(target=_obey, name="launcher", daemon=True).start()
    target, payload, logs = rank_target(config, "auto")
    result = spawn_ranks(asked["ranks"], target, payload, logs, first)
    tell(result, logs)
    return result.code


def _obey() -> None:
    asked = False
    for line in sys.stdin:
        if line.strip() == "kill":
            break
        if not asked:
            asked = True
            _signal()
    else:
        if not asked:
            _signal()
        time.sleep(SAVE_SECONDS)
    _signal()
    time.sleep(2 * REPEAT_SECONDS)
    _signal()  # the second one ends without saving


def _signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
