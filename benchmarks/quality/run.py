r"""Accuracy for a number of forward passes: ours, ZO-Act as in its paper, a random basis, and MeZO on all weights.

    python benchmarks/quality/run.py MODEL --data DIRECTORY --engine transformers
    python benchmarks/quality/run.py MODEL --data DIRECTORY --dtype bfloat16 --servers 4 \
        --vllm "--gpu-memory-utilization 0.2 --kv-cache-memory-bytes 2G --max-model-len 2048" --minutes 9

MODEL is a checkpoint's directory; DIRECTORY holds sst2, trec, agnews and subj, each with train, dev and test.jsonl.
Runs go through real servers, each of which trains many adapters side by side, and MeZO's in programs of their own
beside them. Every run that ends adds lines to the results file, and is not made again; one that is cut off by
``--minutes`` goes on where it was at the next start, as long as the work directory is there (MeZO's begin anew). The
table is of all finished runs. ``--plan`` says what is missing, and about how long it takes; ``plan.py`` says what is
compared, and how.

For a model this small the GPU is never the limit: vLLM's request path is, or the launching of kernels. Several servers
share one GPU: of vLLM's each keeps two cores busy, of the Transformers engine's one. The latter evaluates one side of a
probe after another, in float32; a server of it is slower, but with many cores to start many of them it comes close.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import plan
from board import Board, Deadline
from plan import Plan
from report import SEQUENCES_PER_S, show_plan, show_table

from zoact_remote import Client
from zoact_remote.cli.local_server import serving
from zoact_remote.cli.settings import DEFAULTS

HERE = Path(__file__).parent
POLL_S = 0.2


def server_lane(board: Board, number: int, url: str, home: Path, data: Path, deadline: Deadline) -> None:
    """Makes one server's runs, one after another."""
    while not deadline.passed():
        run, more = board.take("server", number)
        if run is None:
            if not more:
                return
            time.sleep(POLL_S)
            continue
        arguments = [url, data, home / run.name, json.dumps(asdict(run)), json.dumps(board.plan.is_trial(run))]
        command = [sys.executable, str(HERE / "through_server.py"), *map(str, arguments)]
        log = home / f"{run.name}.log"
        with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            try:
                # None waits for as long as it takes.
                limit = None if deadline.left_s == float("inf") else max(deadline.left_s, 0.0)
                answer, _ = process.communicate(timeout=limit)
            except BaseException as error:
                process.kill()
                if isinstance(error, subprocess.TimeoutExpired):
                    return
                raise
        if process.returncode:
            board.failed(run, f"see {log}")
        else:
            board.done(run, [json.loads(answer)])


def mezo_lane(board: Board, model: str, home: Path, data: Path, deadline: Deadline) -> None:
    """Makes MeZO's runs, one after another, in one process."""
    command = [sys.executable, str(HERE / "mezo.py"), model, str(data)]
    log = home / f"mezo-{threading.get_ident()}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        stop = threading.Timer(min(deadline.left_s, threading.TIMEOUT_MAX), process.kill)
        stop.start()
        try:
            while not deadline.passed():
                run, more = board.take("mezo", 0)
                if run is not None:
                    ask = {"run": asdict(run), "marks": board.plan.marks(run), "is_trial": board.plan.is_trial(run)}
                    with suppress(BrokenPipeError):
                        print(json.dumps(ask), file=process.stdin, flush=True)
                    answer = process.stdout.readline()
                    if not answer:
                        board.failed(run, "cut off" if deadline.passed() else f"see {log}")
                        return
                    board.done(run, json.loads(answer))
                elif more:
                    time.sleep(POLL_S)
                else:
                    return
        finally:
            stop.cancel()
            process.kill()


def make(options: argparse.Namespace, todo: Plan) -> None:
    """Makes the missing runs, until the time is up."""
    deadline = Deadline(options.minutes)
    about = {
        "model": Path(options.model).name,
        "device": device(),
        "commit": options.commit or commit(),
    }
    precision = {
        "server": {"engine": options.engine, "dtype": options.dtype},
        "mezo": {"engine": "PyTorch", "dtype": "float32"},
    }
    homes = [options.work / f"server-{i}" for i in range(options.servers)]
    board = Board(todo, options.results, {where: about | p for where, p in precision.items()}, homes)
    places = {todo.methods[run.method].where for run in todo.missing(plan.read(options.results))}
    options.work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        homes = homes if "server" in places else []
        servers = [stack.enter_context(serving(arguments(options, home), home / "log")) for home in homes]
        clients = [stack.enter_context(Client(server.url)) for server in servers]
        lanes = stack.enter_context(ThreadPoolExecutor(len(homes) * options.side_by_side + options.mezo))
        # However we end, lanes end before the servers that they use.
        stack.callback(deadline.now)
        work = []
        if "mezo" in places:
            mezo = (board, options.model, options.work, options.data, deadline)
            work += [lanes.submit(mezo_lane, *mezo) for _ in range(options.mezo)]
        for i, (server, client, home) in enumerate(zip(servers, clients, homes, strict=True)):
            server.wait_until_ready(client)
            lane = (board, i, server.url, home, options.data, deadline)
            work += [lanes.submit(server_lane, *lane) for _ in range(options.side_by_side)]
        for done in as_completed(work):
            done.result()


def arguments(options: argparse.Namespace, home: Path) -> list[str]:
    """Of ``zoact serve``."""
    home.mkdir(parents=True, exist_ok=True)
    given = [options.model, "--engine", options.engine, "--state", str(home / "state"), "--dtype", options.dtype]
    if options.engine == "vllm":
        # Both sides of every run's probe fit into one batch.
        given += ["--slots", str(2 * options.side_by_side), "--max-rank", str(DEFAULTS.rank)]
        given += ["--", *shlex.split(options.vllm)]
    return given


def device() -> str:
    """What runs the model."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
        if found:
            return found[0]
    return "CPU"


def commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=plan.TASKS)
    parser.add_argument(
        "--methods", nargs="+", choices=plan.METHODS | plan.ABLATION | plan.REGIMES, default=list(plan.METHODS)
    )
    parser.add_argument("--ablation", action="store_true", help="compare bases, in place of methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=plan.SEEDS)
    parser.add_argument("--budgets", type=int, nargs="+", default=plan.BUDGETS)
    parser.add_argument("--engine", choices=list(SEQUENCES_PER_S), default="vllm")
    parser.add_argument("--dtype", default="float32", help="of the servers' weights; MeZO's are float32")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--side-by-side", type=int, default=8, help="runs that a server trains at once")
    parser.add_argument("--mezo", type=int, default=1, help="of MeZO's runs at once")
    parser.add_argument("--vllm", default="", metavar="FLAGS", help="for vLLM itself")
    parser.add_argument("--minutes", type=float, help="end after so many")
    parser.add_argument(
        "--results", type=Path, help="file of finished runs; named after model and precision if not given"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="of runs that are under way")
    parser.add_argument("--commit", help="to note, where git does not know it")
    parser.add_argument("--plan", action="store_true", help="say what is missing, and make nothing")
    parser.add_argument("--table", action="store_true", help="show what is there, and make nothing")
    options = parser.parse_args()
    name = f"{Path(options.model).name}-{options.engine}-{options.dtype}.jsonl"
    options.results = options.results or HERE / "results" / name
    methods = plan.select(plan.ABLATION if options.ablation else options.methods)
    todo = Plan(methods, options.tasks, options.seeds, sorted(options.budgets))
    if options.plan:
        show_plan(todo, plan.read(options.results), options.engine, options.servers, options.mezo)
        return
    if not options.table:
        make(options, todo)
    show_table(todo, plan.read(options.results))


if __name__ == "__main__":
    main()
