"""The reward of Python code that passes tests.

The code runs in a process of its own, with limits on its time and memory and on the size of the files that it writes.
That guards against accidents and is NO SANDBOX: it runs as the user who trains, with that user's files and network.
Nor does it keep out code that is made to look as if it passed: what runs the tests lies open to it, in its own process.
Where a model may write harm, train inside a container or a virtual machine that holds nothing of worth.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from zoact_remote.errors import InvalidValue
from zoact_remote.rewarded import Reward
from zoact_remote.wire import Row

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
"""Code in Markdown; the end may be missing where a text was cut off."""
LARGEST_FILE_BYTES = 1 << 20

# A test counts once its line is out, by a word that is new each time: what the code happens to print, or its exit, does
# not pass one. Code that looks for the word finds it. The code is a module by name, since dataclasses look theirs up.
# Limits are set in here, since Python cannot safely run anything between fork and exec in a process with threads.
RUNNER = """
import json, os, resource, sys
job = json.load(sys.stdin)
report = os.fdopen(os.dup(1), "w", buffering=1)
nowhere = os.open(os.devnull, os.O_WRONLY)
for stream in (1, 2):
    os.dup2(nowhere, stream)
for name, limit in job["limits"].items():
    kind = getattr(resource, name)
    given = resource.getrlimit(kind)[1]
    limit = limit if given == resource.RLIM_INFINITY else min(limit, given)
    resource.setrlimit(kind, (limit, limit))
space = sys.modules.setdefault("answer", type(sys)("answer")).__dict__
exec(compile(job["code"], "answer", "exec"), space)
for test in job["tests"]:
    try:
        exec(compile(test, "test", "exec"), dict(space))
    except Exception:
        continue
    print(job["word"], file=report)
"""


def passing_tests(tests: str = "tests", *, timeout: float = 5.0, memory_mib: int = 512) -> Reward:
    """The share of a row's tests that the text passes as Python code. Runs on Linux and macOS.

    The code is the text's first fenced block, or all of it if there is none. Each test is Python too, such as
    ``assert double(2) == 4``; it passes if it raises nothing, and sees what the code defined, not other tests' names.
    What follows the end of the time, or of the process, has not passed.

    It runs code that a model wrote: :mod:`zoact_remote.unit_tests` says what that means.

    Args:
        tests: name of the rows' field that holds them, a list of texts.
        timeout: seconds for all tests of a row, greater than 0; of the processor's time as well as of the clock's.
        memory_mib: of address space, at least 64.

    """
    if os.name != "posix":
        raise InvalidValue("tests", "code is only run where its time and memory can be limited, on POSIX systems")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise InvalidValue("timeout", f"must be finite and greater than 0, got {timeout}")
    if memory_mib < 64:
        raise InvalidValue("memory_mib", f"must be at least 64, got {memory_mib}")
    limits = {
        "RLIMIT_CPU": math.ceil(timeout),
        "RLIMIT_AS": memory_mib << 20,
        "RLIMIT_FSIZE": LARGEST_FILE_BYTES,
        "RLIMIT_CORE": 0,
    }

    def reward(row: Row, text: str) -> float:
        wanted = row.get(tests)
        if not isinstance(wanted, (list, tuple)) or not wanted:
            raise InvalidValue(tests, f"the reward needs a list of tests in this field of the row, got {wanted!r}")
        fenced = FENCED.search(text)
        return _passed(fenced[1] if fenced else text, list(wanted), limits, timeout) / len(wanted)

    return reward


def _passed(code: str, tests: list[str], limits: dict[str, int], timeout: float) -> int:
    """How many tests pass."""
    word = secrets.token_hex()
    job = json.dumps({"code": code, "tests": tests, "limits": limits, "word": word})
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as report:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            # Nothing of the caller's, such as keys, but for what Python itself needs.
            env={"PATH": os.defpath, "HOME": directory, "TMPDIR": directory},
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(job.encode(), timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report.seek(0)
        return min(report.read().decode(errors="replace").splitlines().count(word), len(tests))
