"""``zoact tenants``: for the operator of a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zoact_remote.cli import options
from zoact_remote.cli.output import CommandFailed, Output, reporting

if TYPE_CHECKING:
    from rich.table import Table

    from zoact_remote.tenants import Tenant

tenants = typer.Typer(help="Manage the tenants of a server, with its operator's key.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Before the slash in its adapters' names.", show_default=False)]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        help="max_adapters=8, once for every limit that is not the server's default; =none for no limit. The others "
        "are max_coefficient_bytes, max_rank, max_probes, max_rows, max_call_tokens, max_request_bytes, "
        "max_import_bytes and requests_per_minute.",
        metavar="NAME=NUMBER",
    ),
]


@tenants.command("list")
def list_tenants(url: options.Url = None, api_key: options.ApiKey = None, as_json: options.AsJson = False) -> None:
    """List the tenants, with their limits."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        found = client.tenants.list()
        described = [{"name": t.name, "adapters": t.adapters, "limits": dict(t.limits)} for t in found]
        output.result({"tenants": described}, _table(found) if found else "no tenants")


@tenants.command()
def add(
    name: Name,
    limit: Limits = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Add a tenant, and show its key, once."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        _show_key(output, name, client.tenants.add(name, _limits(limit)))


@tenants.command()
def limits(
    name: Name,
    limit: Limits = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Change what a tenant may use; what is not named goes back to the server's defaults."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        client.tenants.set_limits(name, _limits(limit))
        output.result({"tenant": name}, f"the limits of {name} are changed")


@tenants.command()
def key(name: Name, url: options.Url = None, api_key: options.ApiKey = None, as_json: options.AsJson = False) -> None:
    """Give a tenant a new key, and show it, once; the old one stops working."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        _show_key(output, name, client.tenants.replace_key(name))


@tenants.command()
def remove(
    name: Name, url: options.Url = None, api_key: options.ApiKey = None, as_json: options.AsJson = False
) -> None:
    """Take a tenant's keys away; its adapters stay until they are deleted."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        client.tenants.remove(name)
        output.result({"removed": name}, f"{name} has no key any longer")


def _show_key(output: Output, name: str, made: str) -> None:
    output.note(f"the key of {name}; the server keeps no copy:")
    output.result({"tenant": name, "key": made}, made)


def _limits(given: list[str] | None) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for text in given or ():
        name, _, value = text.partition("=")
        if value != "none" and not value.isdecimal():
            raise CommandFailed(f"--limit {text}: give a whole number or none, such as max_adapters=8")
        found[name] = None if value == "none" else int(value)
    return found


def _table(found: list[Tenant]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("tenant", no_wrap=True)
    table.add_column("adapters", justify="right")
    table.add_column("limits")
    for tenant in found:
        shown = (f"{name} {'none' if limit is None else f'{limit:,}'}" for name, limit in tenant.limits.items())
        table.add_row(tenant.name, str(tenant.adapters), ", ".join(shown))
    return table
