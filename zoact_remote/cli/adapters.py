"""Commands about adapters that there are: ``zoact adapters``, ``export``, ``rollback`` and ``audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zoact_remote.cli import options
from zoact_remote.cli.output import CommandFailed, reporting

if TYPE_CHECKING:
    from rich.table import Table

    from zoact_remote.wire import AdapterInfo

SHOWN_FAILURES = 5
"""Of an audit: what goes wrong once goes on to the end."""


def export(
    adapter: options.Adapter,
    directory: Annotated[Path, typer.Argument(help="Made if it does not exist.", show_default=False)],
    version: options.Version = None,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a version of an adapter as a PEFT directory, which PEFT and vLLM load as a LoRA."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        found = client.adapter(adapter)
        # Named here, so that what is said is what was written even if someone trains it meanwhile.
        version = found.info.version if version is None else version
        with output.waiting(f"exporting {adapter}@{version}"):
            found.export(directory, version=version, dtype=dtype)
        output.result(
            {"adapter": adapter, "version": version, "dtype": dtype, "directory": str(directory)},
            f"{adapter}@{version} is in {directory}",
        )


def rollback(
    adapter: options.Adapter,
    version: Annotated[int, typer.Argument(help="The version to return to; 0 is the model itself.", min=0)],
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Return an adapter to a version: make a new version with the same coefficients."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        made = client.adapter(adapter).rollback(version)
        output.result(
            {"adapter": adapter, "version": made.version, "rollback_to": version, "digest": made.digest},
            f"{adapter} is at version {made.version}, which is version {version} again",
        )


def audit(
    adapter: options.Adapter,
    export: Annotated[
        Path | None, typer.Option(help="Check this float32 export too.", metavar="DIRECTORY", show_default=False)
    ] = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Rebuild an adapter from its journal, here and with NumPy alone, and compare it with what the server says.

    Exits with code 1 if anything does not agree.
    """
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        found = client.adapter(adapter)
        with output.waiting(f"rebuilding {adapter} from its journal"):
            made = found.audit(export)
        if made.failures:
            shown = "\n".join(made.failures[:SHOWN_FAILURES])
            raise CommandFailed(
                f"{adapter} is not what its journal makes: {len(made.failures)} of its checks failed\n{shown}"
            )
        compared = "the coefficients" if made.exact else "the journal; Gaussian coefficients differ between devices"
        lines = [f"{adapter} is at version {made.version}: every digest is that of {compared}"]
        if export is not None:
            close = "to the bit" if made.exact else "within the tolerance for Gaussian noise"
            lines.append(f"{export} holds the coefficients of version {made.exported}, {close}, and the basis")
        output.result(
            {
                "adapter": adapter,
                "version": made.version,
                "digest": made.digest,
                "exact": made.exact,
                "exported_version": made.exported,
            },
            "\n".join(lines),
        )


def adapters(
    delete: Annotated[
        str | None, typer.Option(help="Delete this one and its history; there is no way back.", metavar="TENANT/NAME")
    ] = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """List the adapters on a server, or delete one."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        if delete is not None:
            client.adapter(delete).delete()
            output.result({"deleted": delete}, f"{delete} is deleted")
            return
        found = client.adapters()
        shown = _table(found) if found else "no adapters"
        output.result({"adapters": [_described(adapter) for adapter in found]}, shown)


def _described(adapter: AdapterInfo) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "version": adapter.version,
        "state": adapter.state,
        "rank": adapter.rank,
        "parameters": adapter.parameters,
        "noise": adapter.noise,
        "basis": adapter.basis.to_json() | {"digest": adapter.basis_digest},
        "digest": adapter.digest,
        "created": adapter.created.isoformat(),
    }


def _table(found: list[AdapterInfo]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    # Where the terminal is narrow, the other columns give way: a name is there to be copied.
    table.add_column("adapter", no_wrap=True)
    for heading in ("version", "rank", "coefficients"):
        table.add_column(heading, justify="right")
    for heading in ("basis", "created"):
        table.add_column(heading)
    for adapter in sorted(found, key=lambda adapter: adapter.name):
        basis = "not taken yet" if adapter.state == "new" else f"{adapter.basis.source}, {adapter.basis.positions}"
        created = adapter.created.astimezone().strftime("%Y-%m-%d %H:%M")
        version, rank = str(adapter.version), str(adapter.rank)
        table.add_row(adapter.name, version, rank, f"{adapter.parameters:,}", basis, created)
    return table
