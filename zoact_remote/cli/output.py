"""What commands say: results on standard output, all else on standard error."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PIPED_WIDTH = 200
"""Columns of tables that no terminal shows: enough that nothing is cut off."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the number of SIGINT, as shells have it."""


class CommandFailed(Exception):
    """A failure that its message explains in full, with what to do about it."""


class Output:
    """Where a command writes.

    Args:
        as_json: results are written as JSON, for programs.

    """

    def __init__(self, as_json: bool) -> None:
        from rich.console import Console

        self.as_json = as_json
        # No markup: names, prompts and messages from elsewhere may hold brackets.
        self.console: Console = Console(stderr=True, markup=False, highlight=False)
        self._results = Console(markup=False, highlight=False)
        if not self._results.is_terminal and "COLUMNS" not in os.environ:
            self._results.width = PIPED_WIDTH

    def note(self, text: str) -> None:
        """Say something for a human."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show a spinner while something is under way."""
        if not self.console.is_terminal:
            self.note(text)
        with self.console.status(text):
            yield

    def result(self, data: Mapping[str, Any], *shown: RenderableType) -> None:
        """Write the result.

        Args:
            data: for programs.
            shown: for humans.

        """
        if self.as_json:
            print(json.dumps(data, indent=2, default=str))
            return
        for part in shown:
            self._results.print(part, soft_wrap=isinstance(part, str))


class _Notes(logging.Handler):
    """Shows what the client logs, such as what it waits for."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        self._output.note(record.getMessage())


@contextmanager
def reporting(as_json: bool) -> Iterator[Output]:
    """Show an expected failure in one line, or as JSON, and exit with code 1."""
    output = Output(as_json)
    log, notes = logging.getLogger("zoact_remote"), _Notes(output)
    log.addHandler(notes)
    try:
        yield output
    except KeyboardInterrupt:
        _fail(output, {"message": "interrupted", "type": "KeyboardInterrupt"})
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        described = describe(error)
        if described is None:
            raise
        _fail(output, described)
        raise typer.Exit(1) from None
    finally:
        log.removeHandler(notes)


def describe(error: Exception) -> dict[str, Any] | None:
    """An expected failure as JSON; None for any other, which is a bug."""
    from zoact_remote.errors import CallFailed, InvalidValue, ZoActError

    described = {"message": str(error), "type": type(error).__name__}
    if isinstance(error, CallFailed):
        details = ("code", "param", "status", "request_id")
        return described | {"message": error.message} | {name: getattr(error, name) for name in details}
    if isinstance(error, InvalidValue):
        return described | {"param": error.param}
    if isinstance(error, OSError) and error.filename is not None:
        return described | {"message": f"{error.filename}: {error.strerror}"}
    expected = (CommandFailed, ZoActError, OSError, json.JSONDecodeError, UnicodeDecodeError)
    return described if isinstance(error, expected) else None


def _fail(output: Output, described: Mapping[str, Any]) -> None:
    if output.as_json:
        print(json.dumps({"error": described}, indent=2))
        return
    line = described["message"]
    param, request_id = described.get("param"), described.get("request_id")
    notes = [f"at {param}"] if param and param not in line else []
    notes += [f"request {request_id}"] if request_id else []
    output.note(f"error: {line}" + (f" ({', '.join(notes)})" if notes else ""))


def results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Figures by name."""
    from rich import box
    from rich.table import Table

    from zoact_remote.report import results_cells

    heads, lines = results_cells(results)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in heads:
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(*line)
    return table
