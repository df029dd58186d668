"""Starting up."""

import subprocess
import sys

import pytest

from tests.zoact_remote.cli.support import run


@pytest.mark.parametrize("command", [(), ("train",), ("top",)])
def test_help_loads_nothing_heavy(command: tuple[str, ...]) -> None:
    program = (
        "import sys; from zoact_remote.cli import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in ('numpy', 'requests', 'torch', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: zoact" in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    "command", ["serve", "train", "runs", "eval", "export", "adapters", "rollback", "audit", "top", "quickstart"]
)
def test_every_command_has_help(command: str) -> None:
    assert "Usage" in run(command, "--help").output


def test_version() -> None:
    assert run("--version").stdout.strip()
