r"""Accuracy for a number of forward passes: ours, ZO-Act as in its paper, a random basis, and MeZO on all weights.

    python benchmarks/quality/run.py MODEL --data DIRECTORY --engine transformers
    ZOACT_GPU_KERNELS=1 python benchmarks/quality/run.py MODEL --data DIRECTORY --dtype bfloat16 --servers 4 \
        --vllm "--gpu-memory-utilization 0.2 --kv-cache-memory-bytes 2G --max-model-len 2048" --minutes 9

MODEL is a checkpoint's directory; DIRECTORY holds sst2, trec, agnews and subj, each with train, dev and test.jsonl.
Runs go through real servers, each of which trains many adapters side by side, and MeZO's in programs of their own beside
them. Every run that ends adds lines to the results file, and is not made again; one that is cut off by ``--minutes``
goes on where it was at the next start, as long as the work directory is there (MeZO's begin anew). The table is of all
finished runs. ``--plan`` says what is missing, and about how long it takes; ``plan.py`` says what is compared, and how.

For a model this small the GPU is never the limit: vLLM's request path is, or the launching of kernels. Several servers
share one GPU: of vLLM's each keeps two cores busy, of the Transformers engine's one. The latter evaluates one side of
a probe after another, in float32; a server of it is slower, but with many cores to start many of them it comes close.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import plan
from plan import Plan, Result, Run

from zoact_remote import Client
from zoact_remote.cli.local_server import serving
from zoact_remote.cli.settings import DEFAULTS

HERE = Path(__file__).parent
SEQUENCES_PER_S = {"vllm": 2000.0, "transformers": 500.0}
"""About what a server does on an H100, for SmolLM2's geometry: measured for vLLM, guessed from launches otherwise."""
MEZO_PASS_S = 0.0125
"""About what a pass of 16 rows takes in plain PyTorch there: guessed from launches."""
POLL_S = 0.2


class Board:
    """Which runs are to be made, are under way, and are done.

    Args:
        todo: the plan.
        results: the file of finished runs.
        about: what every line says beside its run and figures.
        servers: number of servers; a run always goes to the same one, which may hold its adapter.

    """

    def __init__(self, todo: Plan, results: Path, about: Mapping[str, object], servers: int) -> None:
        self.plan = todo
        self._path = results
        self._about = about
        self._servers = servers
        self._results = plan.read(results)
        self._under_way: set[Run] = set()
        self._failed: set[Run] = set()
        self._lock = threading.Lock()

    def take(self, where: str, server: int) -> tuple[Run | None, bool]:
        """The next run for a lane, and whether there may be another one later."""
        with self._lock:
            missing = [run for run in self.plan.missing(self._results) if run not in self._failed]
            mine = [
                run
                for run in missing
                if self.plan.methods[run.method].where == where
                and (where == "mezo" or zlib.crc32(run.name.encode()) % self._servers == server)
            ]
            for run in mine:
                if run not in self._under_way and not any(self.plan.covers(r, run) for r in self._under_way):
                    self._under_way.add(run)
                    return run, True
            # Trials that are under way elsewhere decide on further runs.
            return None, any(self.plan.methods[run.method].where == where for run in self._under_way)

    def done(self, run: Run, found: Sequence[Result]) -> None:
        with self._lock:
            self._under_way.discard(run)
            for budget, figures in zip(self.plan.marks(run), found, strict=True):
                of = Run(run.task, run.method, run.rate, run.seed, budget)
                if of in self._results:
                    continue
                line = {**asdict(of), **figures, **self._about}
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                self._results[of] = line
                print(f"{of.name}: {figures['accuracy']:.3f}", file=sys.stderr, flush=True)

    def failed(self, run: Run, why: str) -> None:
        """It is not tried again before the next start."""
        with self._lock:
            self._under_way.discard(run)
            self._failed.add(run)
            print(f"{run.name} failed: {why}", file=sys.stderr, flush=True)


class Deadline:
    """When to end."""

    def __init__(self, minutes: float | None) -> None:
        self._at = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        """Seconds; infinite if there is no end."""
        return self._at - time.monotonic()

    def passed(self) -> bool:
        return self.left_s <= 0


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
        "engine": options.engine,
        "dtype": options.dtype,
        "device": device(),
        "commit": options.commit or commit(),
    }
    board = Board(todo, options.results, about, options.servers)
    places = {todo.methods[run.method].where for run in todo.missing(plan.read(options.results))}
    options.work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        homes = [options.work / f"server-{i}" for i in range(options.servers if "server" in places else 0)]
        servers = [stack.enter_context(serving(arguments(options, home), home / "log")) for home in homes]
        clients = [stack.enter_context(Client(server.url)) for server in servers]
        with ThreadPoolExecutor(len(homes) * options.side_by_side + options.mezo + 1) as lanes:
            work = []
            if "mezo" in places:
                mezo = (board, options.model, options.work, options.data, deadline)
                work += [lanes.submit(mezo_lane, *mezo) for _ in range(options.mezo)]
            for i, (server, client, home) in enumerate(zip(servers, clients, homes, strict=True)):
                server.wait_until_ready(client)
                lane = (board, i, server.url, home, options.data, deadline)
                work += [lanes.submit(server_lane, *lane) for _ in range(options.side_by_side)]
            for lane in as_completed(work):
                lane.result()


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


def show_plan(options: argparse.Namespace, todo: Plan) -> None:
    """What is missing, and about how long it takes on an H100."""
    results = plan.read(options.results)
    missing = list(todo.missing(results, guess=True))
    print("| method | runs | of them trials | forward passes | sequences | minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, method in todo.methods.items():
        of_it = [run for run in missing if run.method == name]
        made = [run for run in of_it if not any(run != other and todo.covers(other, run) for other in of_it)]
        passes = sum(run.budget for run in made)
        sequences = passes * DEFAULTS.batch_size + 2 * plan.ROWS_EVALUATED * len(of_it)
        if method.where == "mezo":
            minutes = sequences / DEFAULTS.batch_size * MEZO_PASS_S / options.mezo / 60
        else:
            minutes = sequences / SEQUENCES_PER_S[options.engine] / options.servers / 60
        trials = sum(map(todo.is_trial, made))
        print(f"| {method.title} | {len(made)} | {trials} | {passes:,} | {sequences:,} | {minutes:.0f} |")
    print(
        f"\nMinutes on one H100, by {SEQUENCES_PER_S[options.engine]:,.0f} sequences a second and server "
        f"({options.servers}), and {MEZO_PASS_S * 1e3:g} ms a pass of MeZO's ({options.mezo} at once). MeZO runs beside "
        "the servers."
    )


def show_table(results: Mapping[Run, Result], todo: Plan) -> None:
    """Mean and standard deviation over seeds."""
    print(f"| task | method | rate | {' | '.join(f'{b:,}' for b in todo.budgets)} |")
    print("| --- " * (3 + len(todo.budgets)) + "|")
    for task in todo.tasks:
        some = next((result for run, result in results.items() if run.task == task), None)
        if some is not None:
            for title, name in (("zero-shot", "zero_shot"), ("zero-shot, label-calibrated", "label_calibrated")):
                print(f"| {task} | {title} | | {some[name]:.3f} |{' |' * (len(todo.budgets) - 1)}")
        for name, method in todo.methods.items():
            rate = todo.rate(name, task, results)
            if rate is None:
                continue
            cells = []
            for budget in todo.budgets:
                runs = [Run(task, name, rate, seed, budget) for seed in todo.seeds]
                cells.append(cell([float(results[run]["accuracy"]) for run in runs if run in results], len(runs)))
            print(f"| {task} | {method.title} | {rate:g} | {' | '.join(cells)} |")
    shown = {(r["model"], r["engine"], r["dtype"], r["device"], r["commit"]) for r in results.values()}
    for model, engine, dtype, where, at in sorted(shown):
        print(f"\n{model}, {engine}, {dtype}, {where}, commit {at}.")


def cell(accuracies: Sequence[float], wanted: int) -> str:
    if not accuracies:
        return ""
    spread = f" ± {statistics.stdev(accuracies):.3f}" if len(accuracies) > 1 else ""
    few = f" ({len(accuracies)} of {wanted})" if len(accuracies) < wanted else ""
    return f"{statistics.mean(accuracies):.3f}{spread}{few}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=plan.TASKS)
    parser.add_argument("--methods", nargs="+", choices=plan.METHODS | plan.ABLATION, default=list(plan.METHODS))
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
        show_plan(options, todo)
        return
    if not options.table:
        make(options, todo)
    show_table({run: r for run, r in plan.read(options.results).items() if run.method in methods}, todo)


if __name__ == "__main__":
    main()
