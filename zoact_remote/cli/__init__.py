"""The command line, ``zoact``.

Nothing here imports requests, NumPy or PyTorch before a command needs it, so that ``zoact --help`` answers at once.
"""

from __future__ import annotations


def main() -> None:
    """Run the command that the process was started with."""
    from zoact_remote.cli.app import app

    app(prog_name="zoact")
