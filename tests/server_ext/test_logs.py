"""A log that cannot be written fails nobody."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_full_disk_fails_no_call() -> None:
    program = "from server_ext.logs import log\nlog.info('lost')\nlog.error('lost too')\nprint('went on')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE, stderr=full, env=os.environ, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.stdout == "went on\n"
