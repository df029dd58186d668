"""The command that starts vLLM with the extension."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import KEY
from zoact_remote.cli.output import CommandFailed
from zoact_remote.cli.vllm_command import lora_rank, vllm_command


def command(*extra: str, **changes: Any) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The flags with their values, and the variables, of a vLLM command."""
    options: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 8000,
        "state": Path("state"),
        "dtype": None,
        "max_rank": 8,
        "slots": 8,
        "training_share": 0.25,
        "api_key": None,
        "keys": None,
        "on_cpu": False,
        "environment": {},
        "plugins": (),
    }
    made = vllm_command("model", extra=extra, **options | changes)
    assert made.arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags: dict[str, list[str]] = {}
    for argument in made.arguments[3:]:
        if argument.startswith("--"):
            assert argument not in flags
            flags[argument] = []
        else:
            flags[list(flags)[-1]].append(argument)
    return flags, made.environment


def test_vllm_on_a_gpu() -> None:
    flags, environment = command()
    assert flags["--dtype"] == ["auto"]
    assert flags["--max-lora-rank"] == ["16"]
    assert (flags["--max-loras"], flags["--max-cpu-loras"]) == (["8"], ["16"])
    assert flags["--worker-extension-cls"] == ["server_ext.extension.ZoActWorker"]
    assert "lm_head" not in flags["--lora-target-modules"]
    assert "--enforce-eager" not in flags
    assert flags["--scheduling-policy"] == ["priority"]
    assert flags["--scheduler-cls"] == ["server_ext.scheduler.sharing_scheduler"]
    assert environment == {
        "VLLM_PLUGINS": "zoact",
        "ZOACT_STATE": str(Path("state").resolve()),
        "ZOACT_TRAINING_SHARE": "0.25",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
    }


def test_vllm_on_the_cpu() -> None:
    flags, environment = command(on_cpu=True)
    assert flags["--dtype"] == ["float32"]
    assert flags["--max-lora-rank"] == ["8"]
    assert "--enforce-eager" in flags
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command(on_cpu=True, environment={"VLLM_CPU_KVCACHE_SPACE": "8"})[1]


def test_flags_of_the_user_win() -> None:
    flags, _ = command("--dtype=bfloat16", "--max_loras", "3", "--no-enforce-eager", on_cpu=True)
    assert "--dtype" not in flags
    assert "--max-loras" not in flags
    assert "--enforce-eager" not in flags
    assert flags["--max-lora-rank"] == ["16"]
    assert flags["--max-cpu-loras"] == ["6"]


def test_where_all_requests_are_alike_vllm_needs_no_priorities() -> None:
    flags, environment = command(training_share=1.0)
    assert not {"--scheduling-policy", "--scheduler-cls"} & set(flags)
    assert environment["ZOACT_TRAINING_SHARE"] == "1.0"


@pytest.mark.parametrize(
    ("before", "plugins", "after"),
    [
        (None, (), "zoact"),
        (None, ("other",), "other,zoact"),
        ("a,b", ("other",), "a,b,zoact"),
        ("a,zoact", (), "a,zoact"),
        ("", ("other",), "zoact"),
    ],
)
def test_other_plugins_stay(before: str | None, plugins: tuple[str, ...], after: str) -> None:
    environment = {} if before is None else {"VLLM_PLUGINS": before}
    assert command(environment=environment, plugins=plugins)[1]["VLLM_PLUGINS"] == after


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text('operators = ["sha256:1"]')
    return file


def test_keys_are_no_flags(keys: Path) -> None:
    flags, environment = command(api_key=KEY, keys=keys)
    assert KEY not in [value for values in flags.values() for value in values]
    assert environment["ZOACT_API_KEY"] == KEY
    assert environment["ZOACT_KEYS"] == str(keys.resolve())


@pytest.mark.parametrize("how", ["a key", "a file"])
def test_where_there_are_keys_vllm_has_one_that_nobody_knows(keys: Path, how: str) -> None:
    given: dict[str, Any] = {"api_key": KEY} if how == "a key" else {"keys": keys}
    first, second = (command(**given)[1]["VLLM_API_KEY"] for _ in range(2))
    assert first != second
    assert KEY not in first
    assert "VLLM_API_KEY" not in command(environment={"VLLM_API_KEY": "theirs"}, **given)[1]


def test_a_file_of_limits_alone_locks_nobody_out(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("[limits]\noperator = { max_rows = 2048 }")
    environment = command(keys=file)[1]
    assert environment["ZOACT_KEYS"] == str(file.resolve())
    assert "VLLM_API_KEY" not in environment


@pytest.mark.parametrize(
    ("rank", "dtype", "slot"),
    [(1, "float32", 1), (2, "float32", 8), (4, "auto", 8), (5, "auto", 16), (160, "half", 320)],
)
def test_lora_ranks(rank: int, dtype: str, slot: int) -> None:
    assert lora_rank(rank, dtype) == slot


def test_a_rank_too_large() -> None:
    with pytest.raises(CommandFailed, match="at most 256"):
        lora_rank(257, "auto")
