"""All of the GPU's benchmarks and tests, as many at once as there are GPUs.

    python benchmarks/gpu/everything.py MODEL --data DIRECTORY --out DIRECTORY --minutes 9 --gpus 0 1 --only quality-a

MODEL is SmolLM2-135M-Instruct's directory, and DATA's are as ``quality/run.py`` wants them. Jobs begin in the order in
which they are named, or else in the list's, each on GPUs of its own, where there is time left for what it is known to
take. What has ended is noted in OUT/done.json and not begun again, so that the command may be given again until nothing
is left; the quality runs go on where they were cut off. OUT has a log for each job; their tables are printed at the
end. Others at work on the same host make what is measured a little slower, which matters most to small batches.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import geometry

ROOT = Path(__file__).parent.parent.parent
POLL_S = 0.5
KILLED_WITHIN_S = 20.0
"""Servers that a job has started end with it, in so many seconds."""
SMALL_GRAPHS = ["1024", "2048", "4096", "8192", "16384"]
LAST_LINES = 40


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: of its log.
        minutes: that it takes about, on an H200; none is begun with less left.
        command: ``{model}``, ``{data}`` and ``{out}`` stand for directories, ``{minutes}`` for what is left.
        gpus: that it needs to itself.
        resumes: whether it ends by itself when the time is up, and goes on where it was.

    """

    name: str
    minutes: float
    command: Sequence[str]
    gpus: int = 1
    resumes: bool = False


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / name), *arguments]


def quality(name: str, *tasks: str) -> Job:
    """Servers of a small model: what they take most of is the launching of kernels, hence the graphs."""
    graphs = json.dumps({"cudagraph_capture_sizes": [64, 128, 256, 512, 1024, 2048, 4096, 8192]}, separators=(",", ":"))
    flags = (
        f"--gpu-memory-utilization 0.2 --kv-cache-memory-bytes 2G --max-model-len 2048 --compilation-config '{graphs}'"
    )
    where = ["--results", f"{{out}}/{name}.jsonl", "--work", f"{{out}}/{name}", "--minutes", "{minutes}"]
    how = ["--dtype", "bfloat16", "--servers", "4", "--side-by-side", "6", "--mezo", "3", "--vllm", flags]
    return Job(
        name, 2, script("quality/run.py", "{model}", "--data", "{data}", "--tasks", *tasks, *how, *where), resumes=True
    )


def serving(share: str) -> Job:
    load = ["--rate", "8", "--prompt", "512", "--output", "64", "--row-tokens", "128", "--seconds", "45"]
    flags = ["--training-share", share, "--", "--load-format", "dummy", "--max-model-len", "4096"]
    return Job(f"serving-{share}", 6, script("serving.py", "{out}/llama-8b", *load, *flags))


ONE_CASE = ("--cases", "32:512:128:token")
JOBS = [
    quality("quality-a", "sst2", "trec"),
    quality("quality-b", "agnews", "subj"),
    Job(
        "tests", 5, [sys.executable, "-m", "pytest", "-v", "--durations=20", str(ROOT / "tests/server_ext/gpu")], gpus=2
    ),
    Job(
        "training-step",
        7,
        script(
            "gpu/training_step.py",
            "--eager",
            "--methods",
            "ours",
            "ours-fp8",
            "in-place",
            "mezo",
            "--tenants",
            "1",
            "16",
        ),
    ),
    serving("0.05"),
    serving("0.0625"),
    Job("throughput", 8, script("gpu/throughput.py", "--kinds", "base", "ours", "stock")),
    Job("ranks", 5, script("gpu/throughput.py", "--eager", "--ranks", "4", "16", "64", *ONE_CASE)),
    Job("probes", 3, script("gpu/throughput.py", "--eager", "--cases", "128:512:128:token")),
    Job(
        "small",
        4,
        script(
            *("gpu/throughput.py", "--geometry", "smollm2-135m", "--ranks", "4", "--kinds", "base", "ours"),
            *("--cases", "16:1024:64:token", "16:1024:64:completion", "--graphs", *SMALL_GRAPHS),
        ),
    ),
    Job("kernels", 3, script("gpu/kernels.py")),
    Job("precision", 5, script("gpu/precision.py", "{model}")),
    Job("quantised", 6, script("gpu/throughput.py", "--eager", "--weights", "bfloat16", "fp8", "int4", *ONE_CASE)),
    Job("memory", 7, script("gpu/memory.py", "--eager", "--ranks", "4", "16")),
    Job("memory-64", 4, script("gpu/memory.py", "--eager", "--ranks", "64")),
    Job("two-gpus", 4, script("gpu/two_gpus.py", "--logs", "{out}"), gpus=2),
]


class Running:
    """A job under way."""

    def __init__(self, job: Job, gpus: Sequence[int], command: Sequence[str], log: Path) -> None:
        self.job, self.gpus, self.log = job, gpus, log
        self._file: IO[bytes] = log.open("ab")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=self._file, stderr=self._file, env=environment, cwd=ROOT, start_new_session=True
        )

    def end(self) -> None:
        """Ends it, if it has not ended."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(KILLED_WITHIN_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._file.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="end after so many")
    parser.add_argument("--gpus", type=int, nargs="+", metavar="NUMBER", help="GPUs to use; all if not given")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], metavar="NAME", help="jobs to make")
    options = parser.parse_args()
    out = options.out.resolve()
    prepare(out)
    noted = out / "done.json"
    done: dict[str, int] = json.loads(noted.read_text()) if noted.exists() else {}
    known = {job.name: job for job in JOBS}
    jobs = [known[name] for name in options.only or known if name not in done]
    deadline = time.monotonic() + 60 * options.minutes - KILLED_WITHIN_S
    free, running = set(options.gpus or range(gpu_count())), list[Running]()
    try:
        while time.monotonic() < deadline and (jobs or running):
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free |= set(one.gpus)
                one.end()
                print(f"{one.job.name}: exit code {one.process.returncode}", flush=True)
                if not one.job.resumes:
                    done[one.job.name] = one.process.returncode
                    noted.write_text(json.dumps(done))
            minutes = (deadline - time.monotonic()) / 60
            for job in list(jobs):
                if job.gpus > len(free) or job.minutes > minutes:
                    continue
                jobs.remove(job)
                gpus = sorted(free)[: job.gpus]
                free -= set(gpus)
                places = {"model": options.model, "data": options.data, "out": out, "minutes": f"{minutes:.2f}"}
                command = [filled(argument, places) for argument in job.command]
                running.append(Running(job, gpus, command, out / f"{job.name}.log"))
                print(f"{job.name}: on {', '.join(map(str, gpus))}", flush=True)
            if not running:
                break
            time.sleep(POLL_S)
    finally:
        for one in running:
            one.end()
    for log in sorted(out.glob("*.log")):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("|", "=", "FAILED"))]
        print("\n".join([f"\n## {log.stem}\n", *lines[-LAST_LINES:]]))


def filled(argument: str, places: dict[str, object]) -> str:
    """An argument with its places filled in; other braces, as JSON has them, are left alone."""
    for name, value in places.items():
        argument = argument.replace(f"{{{name}}}", str(value))
    return argument


def prepare(out: Path) -> None:
    """Makes the directory, with the geometry that serving is measured with."""
    out.mkdir(parents=True, exist_ok=True)
    geometry.write("llama-8b", out / "llama-8b")


def gpu_count() -> int:
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    return len(listed.splitlines())


if __name__ == "__main__":
    main()
