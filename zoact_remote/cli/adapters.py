"""Commands about adapters themselves: to list, delete, export, import, roll back and audit them."""

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
    directory: Annotated[
        Path,
        typer.Argument(help="Made if it does not exist; empty, or of an earlier export of a LoRA.", show_default=False),
    ],
    version: options.Version = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Of the weights: float32 if not given. A merged model keeps its checkpoint's."),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            help="Write a whole model: a copy of this checkpoint of the base model, with the adapter in its weights.",
            metavar="CHECKPOINT",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a version of an adapter as a PEFT directory, which PEFT and vLLM load as a LoRA, or as a whole model."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        from zoact_remote.exports import ABOUT

        if merge is not None and dtype is not None:
            raise CommandFailed("--dtype is for LoRAs: a merged model has the types of its checkpoint")
        if directory.is_dir() and any(directory.iterdir()) and (merge or not (directory / ABOUT).is_file()):
            raise CommandFailed(f"{directory} holds other files: give an empty directory, or a new one")
        found = client.adapter(adapter)
        # Named here, so that what is said is what was written even if someone trains it meanwhile.
        version = found.info.version if version is None else version
        made: dict[str, Any] = {"adapter": adapter, "version": version, "directory": str(directory)}
        if merge is not None:
            with output.waiting(f"merging {adapter}@{version} into a copy of {merge}"):
                found.export_merged(directory, merge, version=version)
            made["checkpoint"] = str(merge)
        else:
            made["dtype"] = dtype or "float32"
            with output.waiting(f"exporting {adapter}@{version}"):
                found.export(directory, version=version, dtype=made["dtype"])
        output.result(made, f"{adapter}@{version} is in {directory}")


def import_(
    directory: Annotated[
        Path, typer.Argument(help="A PEFT directory.", exists=True, file_okay=False, show_default=False)
    ],
    adapter: options.Adapter,
    noise: Annotated[options.Noise, typer.Option(help="Distribution of the probes that will train it.")] = "rademacher",
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Create an adapter whose version 0 is a LoRA: an earlier export, or any other that fits the model."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        with output.waiting(f"importing {directory}"):
            made = client.import_adapter(adapter, directory, noise=noise).info
        output.result(
            _described(made),
            f"{adapter}: {made.parameters:,} coefficients in {len(made.sites)} layers; basis of rank {made.rank}",
        )


def rollback(
    adapter: options.Adapter,
    version: Annotated[int, typer.Argument(help="The version to return to; 0 is what it began with.", min=0)],
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


def delete(
    adapter: options.Adapter,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Delete an adapter with all of its versions; there is no way back."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        found = client.adapter(adapter)
        if not (yes or _is_sure(f"delete {adapter}, which is at version {found.version}, for good?")):
            raise CommandFailed(f"{adapter} is left as it is; --yes deletes it without asking")
        found.delete()
        output.result({"deleted": adapter}, f"{adapter} is deleted")


def _is_sure(question: str) -> bool:
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:  # Ctrl-C, or nobody is there to answer
        return False


def adapters(url: options.Url = None, api_key: options.ApiKey = None, as_json: options.AsJson = False) -> None:
    """List the adapters on a server."""
    with reporting(as_json) as output, options.connect(url, api_key) as client:
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
        "imported_digest": adapter.imported_digest,
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
        source = adapter.basis.source
        basis = f"{source}, {adapter.basis.positions}" if source == "activations" else source
        basis = "not taken yet" if adapter.state == "new" else basis
        created = adapter.created.astimezone().strftime("%Y-%m-%d %H:%M")
        version, rank = str(adapter.version), str(adapter.rank)
        table.add_row(adapter.name, version, rank, f"{adapter.parameters:,}", basis, created)
    return table
