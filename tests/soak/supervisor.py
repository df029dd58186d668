"""Servers that start in a moment: a process imports everything, loads the model once, and forks for every start.

The servers are those of ``zoact serve --engine transformers``, but for what happens before ``create_app``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support import ENVIRONMENT
from zoact_remote.cli.local_server import LOOPBACK


class Supervisor:
    """A process that forks servers of one model.

    Args:
        model: directory of the checkpoint.
        log: file that its output and that of all servers is appended to.

    """

    def __init__(self, model: Path, log: Path) -> None:
        # More than one thread would not outlive a fork.
        alone = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        before = {name: value for name, value in os.environ.items() if not name.startswith("ZOACT_")}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(model)],
                env={**before, **ENVIRONMENT, **alone},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def start(self, state: Path, port: int, environment: Mapping[str, str]) -> int:
        """Starts a server and returns its process id; it does not listen yet."""
        return self._ask({"state": str(state), "port": port, "environment": dict(environment)})

    def wait(self, pid: int) -> int:
        """Waits for a server's end; returns its exit code, or the negative number of the signal that ended it."""
        return self._ask({"wait": pid})

    def close(self) -> None:
        """Ends it, with all servers that still run."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, question: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the supervisor has ended; its log says why")
        return int(answer)


def main() -> None:
    import torch
    import uvicorn

    from server_ext.app import create_app
    from server_ext.engines.transformers import TransformersEngine
    from server_ext.tenants import open_tenants

    torch.set_num_threads(1)
    engine = TransformersEngine(sys.argv[1])
    running: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            running.remove(question["wait"])
            _, status = os.waitpid(question["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid:
            running.add(pid)
            print(pid, flush=True)
            continue
        code = 1
        try:
            os.environ.update(question["environment"])
            # What the parent is told, and what it answers, is none of the server's business.
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            os.dup2(2, 1)
            state = Path(question["state"])
            uvicorn.run(
                create_app(engine, state, open_tenants(state, LOOPBACK)),
                host=LOOPBACK,
                port=question["port"],
                access_log=False,
                log_level="warning",
            )
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    for pid in running:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
