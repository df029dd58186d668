"""The command line that starts vLLM with the extension."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zoact_remote import toml
from zoact_remote.cli.output import CommandFailed
from zoact_remote.extension import KEEP_ALIVE_S, PLUGIN, SCHEDULER, SHARE_VARIABLE, STATE_VARIABLE, WORKER_EXTENSION

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Where adapters may act. Not ``lm_head``: LoRA there breaks prompt log-probabilities."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has slots for."""
SECRETS = ("VLLM_API_KEY", "ZOACT_API_KEY")
SHUTDOWN_S = 60
ENVIRONMENT = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S)}
CPU_ENVIRONMENT = {
    # In GiB. By default vLLM takes up to half of the memory.
    "VLLM_CPU_KVCACHE_SPACE": "2",
    # By default vLLM keeps a core for its API server: half of a machine of two, though it idles while the model runs.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
"""Groups that vLLM loads all of as long as ``VLLM_PLUGINS`` is not set."""


@dataclass(frozen=True)
class VllmCommand:
    """A command to run.

    Attributes:
        arguments: the program first.
        environment: variables to set beside those that there are.

    """

    arguments: list[str]
    environment: dict[str, str]


def vllm_command(
    model: str,
    *,
    host: str,
    port: int,
    state: Path,
    dtype: str | None,
    max_rank: int,
    slots: int,
    training_share: float,
    api_key: str | None,
    keys: Path | None,
    extra: Sequence[str],
    on_cpu: bool,
    environment: Mapping[str, str],
    plugins: Collection[str],
) -> VllmCommand:
    """The command for ``zoact serve``'s options.

    Args:
        model: a directory or a name on the hub.
        host: to listen at.
        port: to listen at.
        state: directory of the journal.
        dtype: of the weights; None for float32 on the CPU and vLLM's choice elsewhere.
        max_rank: largest rank of an adapter.
        slots: adapters and probes in a batch.
        training_share: of a batch's tokens that training takes at most while there is other traffic; 1 treats all
            requests alike.
        api_key: the operator's; None for none.
        keys: file of keys and limits; None for none.
        extra: flags for vLLM. They win: no flag that is there is added.
        on_cpu: whether this vLLM is the CPU's.
        environment: as it is.
        plugins: vLLM plug-ins that are installed; see :func:`installed_plugins`.

    """
    given = flags(extra)
    dtype = dtype or ("float32" if on_cpu else "auto")
    loras = given.get("--max-loras") or str(slots)
    wanted: list[tuple[str, list[str]]] = [
        ("--model", [model]),
        ("--host", [host]),
        ("--port", [str(port)]),
        ("--dtype", [dtype]),
        ("--enable-lora", []),
        ("--max-loras", [loras]),
        # Twice, so that adapters stay at hand while a step's probes pass through.
        ("--max-cpu-loras", [str(2 * int(loras)) if loras.isdecimal() else loras]),
        ("--max-lora-rank", [str(lora_rank(max_rank, given.get("--dtype") or dtype))]),
        ("--lora-target-modules", list(LAYERS)),
        ("--worker-extension-cls", [WORKER_EXTENSION]),
        # Requests that run when the server is told to stop may end.
        ("--shutdown-timeout", [str(SHUTDOWN_S)]),
    ]
    if training_share < 1:
        wanted += [("--scheduling-policy", ["priority"]), ("--scheduler-cls", [SCHEDULER])]
    if on_cpu:
        # Compiled code would bypass the grouped LoRA kernels.
        wanted.append(("--enforce-eager", []))
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, values in wanted:
        if name not in given:
            arguments += [name, *values]
    changes = {
        "VLLM_PLUGINS": _plugins(environment.get("VLLM_PLUGINS"), plugins),
        STATE_VARIABLE: str(state.resolve()),
        SHARE_VARIABLE: str(training_share),
    }
    changes |= key_environment(api_key, keys)
    guarded = api_key is not None or (keys is not None and _holds_keys(keys))
    if guarded and "VLLM_API_KEY" not in environment:
        # vLLM starts without a plug-in that fails to load. Then nobody knows the key of its routes.
        changes["VLLM_API_KEY"] = secrets.token_urlsafe(32)
    defaults = ENVIRONMENT | (CPU_ENVIRONMENT if on_cpu else {})
    changes |= {name: value for name, value in defaults.items() if name not in environment}
    return VllmCommand([*arguments, *extra], changes)


def key_environment(api_key: str | None, keys: Path | None) -> dict[str, str]:
    """The variables by which the server learns of keys: not flags, which every user of the machine can read."""
    found = {"ZOACT_API_KEY": api_key, "ZOACT_KEYS": None if keys is None else str(keys.resolve())}
    return {name: value for name, value in found.items() if value is not None}


def lora_rank(max_rank: int, dtype: str) -> int:
    """The smallest of vLLM's slots for adapters of a rank.

    In 16 bits a probe takes columns of its own beside the coefficients', so that a small epsilon does not round away.

    Raises:
        CommandFailed: there is none so large.

    """
    needed = max_rank if dtype in ("float32", "float") else 2 * max_rank
    for rank in LORA_RANKS:
        if rank >= needed:
            return rank
    most = LORA_RANKS[-1] * max_rank // needed
    raise CommandFailed(f"--max-rank {max_rank}: vLLM has slots for at most {most} at --dtype {dtype}")


def installed_plugins() -> list[str]:
    """Names of the vLLM plug-ins that are loaded by default."""
    from importlib.metadata import entry_points

    return sorted({entry.name for group in PLUGIN_GROUPS for entry in entry_points(group=group)})


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU's, which is a distribution of its own."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def flags(extra: Sequence[str]) -> dict[str, str | None]:
    """Flags by their full name, with the value after them if there is one. ``--no-x`` counts as ``--x``."""
    found: dict[str, str | None] = {}
    for i, argument in enumerate(extra):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if not equals:
            value = extra[i + 1] if i + 1 < len(extra) and not extra[i + 1].startswith("--") else ""
        found[name.replace("--no-", "--", 1) if name.startswith("--no-") else name] = value or None
    return found


def _holds_keys(file: Path) -> bool:
    """Whether a keys file names anybody: it may hold limits alone."""
    found = toml.load(file)
    return bool(found.get("operators") or found.get("tenants"))


def _plugins(allowed: str | None, installed: Collection[str]) -> str:
    # Once set, VLLM_PLUGINS is the list of all plug-ins that vLLM loads: those of before must stand there beside ours.
    names = list(installed) if allowed is None else [name for name in allowed.split(",") if name]
    return ",".join(names if PLUGIN in names else [*names, PLUGIN])
