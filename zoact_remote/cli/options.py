"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zoact_remote.cli.output import CommandFailed

if TYPE_CHECKING:
    from zoact_remote.client import Client

Engine = Literal["vllm", "transformers"]
Noise = Literal["rademacher", "gaussian"]
"""``zoact_remote.noise.Distribution``, which would bring NumPy along before a command needs it."""

ANSWER_WITHIN_S = (5.0, 60.0)
"""To connect, and from then on."""
_SERVER = "Server"
_DATA = "Data"

Url = Annotated[
    str | None,
    typer.Option(
        help="Where the server is; http://127.0.0.1:8000 if not given.",
        envvar="ZOACT_URL",
        metavar="URL",
        rich_help_panel=_SERVER,
    ),
]
ApiKey = Annotated[
    str | None, typer.Option(help="Sent to the server.", envvar="ZOACT_API_KEY", metavar="KEY", rich_help_panel=_SERVER)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write the result as JSON to standard output, and nothing else there.")
]
Adapter = Annotated[str, typer.Argument(help="Its name, such as acme/triage.", show_default=False)]
AdapterName = Annotated[str, typer.Option(help="Its name, such as acme/triage.", metavar="TENANT/NAME")]
Version = Annotated[
    int | None, typer.Option(min=0, help="The newest if not given; 0 is the model itself, or what was imported.")
]

TaskName = Annotated[
    str | None,
    typer.Option(
        help="A task's TOML file, or a built-in task: sst2, sst5, subj, trec, agnews, rte, cb, boolq, wic, copa, "
        "squad, mawps, gsm8k, tickets.",
        metavar="FILE|NAME",
        rich_help_panel=_DATA,
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="The prompt, with a record's fields in braces: '{text} It was'. \\n stands for a new line.",
        rich_help_panel=_DATA,
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        help="A label and its word, 'billing= billing', once for every label. If not given, each label in the data is "
        "its own word.",
        metavar="LABEL=WORD",
        rich_help_panel=_DATA,
    ),
]
Completion = Annotated[
    str | None,
    typer.Option(help="Learn to complete the prompt in place of labels: ' {answer}'.", rich_help_panel=_DATA),
]
TextField = Annotated[
    str | None, typer.Option(help="The field that {text} stands for.", metavar="FIELD", rich_help_panel=_DATA)
]
LabelField = Annotated[
    str | None, typer.Option(help="The field that holds the label.", metavar="FIELD", rich_help_panel=_DATA)
]
Data = Annotated[
    str,
    typer.Argument(
        help="Records: a file (.jsonl, .csv, .tsv or .parquet), or a data set on the hub, such as ag_news@test or "
        "super_glue:copa@validation.",
        metavar="FILE|NAME",
        show_default=False,
    ),
]


@contextmanager
def connect(url: str | None, api_key: str | None) -> Iterator[Client]:
    """A client for the options' server, which answers.

    Raises:
        typer.BadParameter: the URL is not one.
        CommandFailed: nobody listens there.

    """
    from zoact_remote.client import Client
    from zoact_remote.errors import ConnectionFailed, InvalidValue, RateLimited

    try:
        client = Client(url, api_key)
    except InvalidValue as error:
        raise typer.BadParameter(str(error)) from None
    with client:
        try:
            # Asked once: with the client's retries, a mistyped URL would take a quarter of a minute to show.
            with suppress(RateLimited):  # somebody is there, and the command's own calls wait
                client.with_options(timeout=ANSWER_WITHIN_S, retries=0, patience=0.0).info()
        except ConnectionFailed as error:
            if error.sent:
                raise
            raise CommandFailed(
                f"no server answers at {client.url}: start one with zoact serve MODEL, or give --url"
            ) from error
        yield client
