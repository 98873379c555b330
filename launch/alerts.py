"""Telling somebody, by a command or a webhook, as the batch script does with `logger` and `curl`."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from contextlib import suppress

from launch.cluster import ClusterConfig

TIMEOUT_SECONDS = 20


def tell(message: str, cluster: ClusterConfig | None) -> None:
    """Say `message` on stderr, and to whom the cluster file names. An alert that fails or hangs is not in the way."""
    _say(message)
    if cluster is None:
        return
    if cluster.alert_command:
        command = ["bash", "-c", f'{cluster.alert_command} "$1"', "alert", message]
        _try(
            "alert_command",
            lambda: subprocess.run(command, stdin=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS, check=True),
        )
    if cluster.alert_webhook:
        request = urllib.request.Request(
            cluster.alert_webhook, json.dumps({"text": message}).encode(), {"Content-Type": "application/json"}
        )
        _try("alert_webhook", lambda: urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close())


def _try(what: str, action) -> None:
    try:
        action()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        _say(f"warning: {what}: {error}")


def _say(message: str) -> None:
    with suppress(OSError):  # the terminal may have gone
        print(message, file=sys.stderr, flush=True)
