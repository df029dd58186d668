"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from zoact_remote.cli.adapters import adapters, audit, delete, export, import_, rollback
from zoact_remote.cli.evaluate import evaluate
from zoact_remote.cli.quickstart import quickstart
from zoact_remote.cli.runs import runs
from zoact_remote.cli.serve import serve
from zoact_remote.cli.tenants import tenants
from zoact_remote.cli.top import top
from zoact_remote.cli.train import train

app = typer.Typer(
    help="Fine-tune a frozen model for many customers on the server that serves it.",
    no_args_is_help=True,
    add_completion=False,
    # Failures that a user can meet are shown as one line (output.reporting); any other deserves a plain traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(context_settings={"allow_extra_args": True})(serve)
app.command()(train)
app.command()(runs)
app.command("eval")(evaluate)
app.command()(export)
app.command("import")(import_)
app.command()(adapters)
app.command()(delete)
app.command()(rollback)
app.command()(audit)
app.command()(top)
app.add_typer(tenants, name="tenants")
app.command()(quickstart)


def _version(wanted: bool) -> None:
    if wanted:
        from zoact_remote import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
