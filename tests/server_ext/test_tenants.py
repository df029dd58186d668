"""Keys and accounts: who is let in, from which place, and what outlasts the process."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server_ext.errors import ApiError
from server_ext.schemas import TenantLimits
from server_ext.tenants import (
    FILE_VARIABLE,
    KEY_VARIABLE,
    Defaults,
    Tenants,
    key_digest,
    open_tenants,
    read_keys_file,
)
from tests.server_ext.support import OPERATOR
from zoact_remote import toml

OPERATORS_KEY = "the operator's"
LIMITS = TenantLimits(max_adapters=3, requests_per_minute=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants.sqlite"


@pytest.fixture
def tenants(path: Path) -> Iterator[Tenants]:
    with closing(Tenants(path, [key_digest(OPERATORS_KEY)])) as found:
        yield found


def tenant_of(tenants: Tenants, key: str) -> str | None:
    """Whose key it is: None for the operator's, "nobody" for one that opens nothing."""
    try:
        return tenants.identify(f"Bearer {key}").tenant
    except ApiError:
        return "nobody"


def test_every_key_opens_its_own_account(tenants: Tenants) -> None:
    keys = {name: tenants.add(name, LIMITS) for name in ("acme", "umbra")}
    assert len(set(keys.values())) == 2
    for name, key in keys.items():
        assert tenant_of(tenants, key) == name
    assert tenants.identify(f"bearer  {keys['acme']} ").limits == LIMITS
    assert tenants.identify(f"Bearer {OPERATORS_KEY}") == OPERATOR


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic {key}", "{key}", "Bearer {key}x", "Bearer {digest}"]
)
def test_nothing_but_a_key_opens(tenants: Tenants, header: str) -> None:
    key = tenants.add("acme", LIMITS)
    for each in (key, OPERATORS_KEY):
        with pytest.raises(ApiError) as refused:
            tenants.identify(header.format(key=each, digest=key_digest(each)))
        assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


@given(st.text(), st.text())
def test_digests_tell_keys_apart(one: str, other: str) -> None:
    assert (key_digest(one) == key_digest(other)) == (one == other)
    assert key_digest(one) != one


def test_no_key_is_kept(tenants: Tenants, path: Path) -> None:
    key = tenants.add("acme", LIMITS)
    for file in path.parent.iterdir():
        assert key.encode() not in file.read_bytes()
        assert OPERATORS_KEY.encode() not in file.read_bytes()


def test_without_keys_whoever_comes_is_the_operator(path: Path) -> None:
    with closing(Tenants(path)) as tenants:
        assert tenants.identify("") == tenants.identify("Bearer anything") == OPERATOR
        with pytest.raises(ApiError) as refused:
            tenants.add("acme", LIMITS)
        assert refused.value.code == "no_operator_key"
        assert tenants.identify("") == OPERATOR


def test_accounts_outlast_the_process(path: Path) -> None:
    with closing(Tenants(path, [key_digest(OPERATORS_KEY)])) as tenants:
        keys = {name: tenants.add(name, LIMITS) for name in ("acme", "umbra", "wayne")}
        replaced = tenants.replace_key("acme")
        tenants.change_limits("umbra", TenantLimits(max_rows=1))
        tenants.remove("wayne")
        before = tenants.all()
    # Without the operator's key too: who has forgotten to give it must not find all doors open.
    with closing(Tenants(path)) as tenants:
        assert tenants.all() == before
        assert [tenant_of(tenants, key) for key in keys.values()] == ["nobody", "umbra", "nobody"]
        assert tenant_of(tenants, replaced) == "acme"
        assert {tenant.name: tenant.limits for tenant in tenants.all()}["umbra"] == TenantLimits(max_rows=1)
        assert tenant_of(tenants, "anything") == "nobody"


def test_keys_are_taken_away_at_once(tenants: Tenants) -> None:
    first = tenants.add("acme", LIMITS)
    second = tenants.replace_key("acme")
    assert [tenant_of(tenants, key) for key in (first, second)] == ["nobody", "acme"]
    tenants.remove("acme")
    assert tenant_of(tenants, second) == "nobody"
    third = tenants.add("acme", TenantLimits())
    assert [tenant_of(tenants, key) for key in (first, second, third)] == ["nobody", "nobody", "acme"]


def test_what_is_not_there_cannot_be_changed(tenants: Tenants) -> None:
    tenants.add("acme", LIMITS)
    with pytest.raises(ApiError) as refused:
        tenants.add("acme", LIMITS)
    assert (refused.value.status, refused.value.code, refused.value.param) == (409, "tenant_exists", "name")
    for change in (tenants.replace_key, tenants.remove, lambda name: tenants.change_limits(name, LIMITS)):
        with pytest.raises(ApiError) as refused:
            change("umbra")
        assert (refused.value.status, refused.value.code, refused.value.param) == (404, "tenant_not_found", "tenant")


@contextmanager
def no_room() -> Iterator[None]:
    """No file can grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_changes_nothing(tenants: Tenants, path: Path) -> None:
    key = tenants.add("acme", LIMITS)
    before = tenants.all()
    for change in (
        lambda: tenants.add("umbra", LIMITS),
        lambda: tenants.replace_key("acme"),
        lambda: tenants.change_limits("acme", TenantLimits()),
        lambda: tenants.remove("acme"),
    ):
        with no_room(), pytest.raises(ApiError) as refused:
            change()
        assert (refused.value.status, refused.value.code) == (503, "storage_failed")
        assert tenants.all() == before
        assert tenant_of(tenants, key) == "acme"
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM keys").fetchone() == (1,)
    assert tenant_of(tenants, tenants.add("umbra", LIMITS)) == "umbra"


# The keys file --------------------------------------------------------------------------------------------------------

A, B, C = (key_digest(letter) for letter in "abc")
FILE = f"""
operators = ["{A}"]

[tenants.acme]
keys = ["{B}", "{C}"]
limits = {{ max_adapters = 8, requests_per_minute = 600 }}

[tenants.umbra]
keys = []
"""


def test_the_keys_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    operators, tenants, defaults = read_keys_file(file)
    assert (operators, defaults) == ([A], Defaults())
    assert [(tenant.name, tenant.keys) for tenant in tenants] == [("acme", {B, C}), ("umbra", frozenset())]
    assert tenants[0].limits == TenantLimits(max_adapters=8, requests_per_minute=600)
    assert tenants[1].limits == TenantLimits()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('operators = ["a-key-in-the-clear"]', "operators.0"),
        (f'operators = ["{A} "]', "operators.0"),
        (f'operators = ["x{A}"]', "operators.0"),
        (f'operator = ["{A}"]', "operator"),
        ('[tenants.acme]\nkeys = ["in-the-clear"]', "tenants.acme.keys.0"),
        ("[tenants.acme]\nlimits = {}", "tenants.acme.keys"),
        ("[tenants.acme]\nkeys = []\nlimits = { max_adapters = -1 }", "tenants.acme.limits.max_adapters"),
        ("[tenants.acme]\nkeys = []\nlimits = { requests_per_minute = 0 }", "tenants.acme.limits.requests_per_minute"),
        ("[tenants.acme]\nkeys = []\nlimits = { max_adaptors = 1 }", "tenants.acme.limits.max_adaptors"),
        ("[tenants.ACME]\nkeys = []", "tenants.ACME"),
        ('[tenants."a/b"]\nkeys = []', "tenants.a/b"),
        ("[limits]\ntenants = { max_rows = -1 }", "limits.tenants.max_rows"),
        ("[limits]\noperator = { max_row = 1 }", "limits.operator.max_row"),
        ("[limits]\nmax_rows = 1", "limits.max_rows"),
        ("operators = [", "keys.toml"),
    ],
)
def test_a_broken_keys_file_is_refused_by_its_field(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"keys.toml: .*{named}|{named}: ") as refused:
        read_keys_file(file)
    assert "in-the-clear" not in str(refused.value)


NAMES = sorted(set(TenantLimits.model_fields))
GIVEN = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 10))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(everybodys=GIVEN, fixed=GIVEN, added=GIVEN, changed=GIVEN, operators=GIVEN)
def test_what_limits_leave_out_is_everybodys_and_then_the_servers(
    tmp_path: Path,
    everybodys: dict[str, int],
    fixed: dict[str, int],
    added: dict[str, int],
    changed: dict[str, int],
    operators: dict[str, int],
) -> None:
    file, path = tmp_path / "keys.toml", tmp_path / "tenants.sqlite"
    path.unlink(missing_ok=True)
    limits = {"tenants": everybodys, "operator": operators}
    file.write_text(toml.dumps({"limits": limits, "tenants": {"fixed": {"keys": [B], "limits": fixed}}}))

    def expected(given: dict[str, int], defaults: dict[str, int]) -> TenantLimits:
        return TenantLimits(**(defaults | given))

    _, tenants, defaults = read_keys_file(file)
    with closing(Tenants(path, [A], tenants, defaults)) as first:
        key = first.add("added", TenantLimits(**added))
        first.add("changed", TenantLimits())
        assert first.change_limits("changed", TenantLimits(**changed)) == expected(changed, everybodys)
        assert first.identify(f"Bearer {key}").limits == expected(added, everybodys)
        assert first.identify("Bearer b").limits == expected(fixed, everybodys)
        assert first.identify("Bearer a").limits == TenantLimits(**(TenantLimits.operators().model_dump() | operators))
    # Another file's defaults take the place of this one's, and not of what tenants were given.
    with closing(Tenants(path, [A])) as second:
        found = {tenant.name: tenant.limits for tenant in second.all()}
    assert found == {"added": expected(added, {}), "changed": expected(changed, {})}


def test_without_keys_everybody_has_the_operators_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("[limits]\noperator = { max_rows = 7, requests_per_minute = 60 }\ntenants = { max_rows = 1 }")
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with closing(open_tenants(tmp_path, "127.0.0.1")) as tenants:
        limits = tenants.identify("").limits
    assert (limits.max_rows, limits.requests_per_minute, limits.max_adapters) == (7, 60, None)


def test_a_missing_keys_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml"):
        read_keys_file(tmp_path / "nowhere.toml")


def test_the_environment_says_who_may_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    monkeypatch.setenv(KEY_VARIABLE, "plain")
    with closing(open_tenants(tmp_path, None, ["vllm's own"])) as tenants:
        whose = {key: tenant_of(tenants, key) for key in ("a", "b", "c", "plain", "vllm's own", "d")}
        assert whose == {"a": None, "b": "acme", "c": "acme", "plain": None, "vllm's own": None, "d": "nobody"}
        for change in (tenants.replace_key, tenants.remove, lambda name: tenants.change_limits(name, LIMITS)):
            with pytest.raises(ApiError) as refused:
                change("acme")
            assert (refused.value.status, refused.value.code) == (409, "tenant_fixed")
        with pytest.raises(ApiError) as refused:
            tenants.add("acme", LIMITS)
        assert refused.value.code == "tenant_exists"
        added = tenants.add("wayne", LIMITS)
        assert [tenant.name for tenant in tenants.all()] == ["acme", "umbra", "wayne"]
        assert tenant_of(tenants, added) == "wayne"


def test_the_environment_may_hold_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, A)
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    with closing(open_tenants(tmp_path, None)) as tenants:
        assert tenant_of(tenants, "a") is None
        assert tenant_of(tenants, A) == "nobody"


NOT_A_KEY = {
    "nothing": {},
    "an empty key": {KEY_VARIABLE: ""},
    "a file without any": {FILE_VARIABLE: "operators = []"},
}


def set_environment(monkeypatch: pytest.MonkeyPatch, directory: Path, variables: dict[str, str]) -> None:
    """The variables, and no other of ours; a file is given by what is in it."""
    for name in (KEY_VARIABLE, FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        if name == FILE_VARIABLE:
            (directory / "keys.toml").write_text(value)
            value = str(directory / "keys.toml")
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("host", [None, "", "0.0.0.0", "::", "10.0.0.1", "gpu-7.example", "127.0.0.1.example"])
@pytest.mark.parametrize("variables", NOT_A_KEY.values(), ids=NOT_A_KEY)
def test_without_a_key_a_server_keeps_to_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], host: str | None
) -> None:
    set_environment(monkeypatch, tmp_path, variables)
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE} .*{FILE_VARIABLE} .*--keys.*--host 127.0.0.1"):
        open_tenants(tmp_path, host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
@pytest.mark.parametrize("variables", NOT_A_KEY.values(), ids=NOT_A_KEY)
def test_whoever_is_on_the_machine_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], host: str
) -> None:
    set_environment(monkeypatch, tmp_path, variables)
    with closing(open_tenants(tmp_path, host)) as tenants:
        assert tenants.open_to_all


@pytest.mark.parametrize(
    ("variables", "given"),
    [
        ({KEY_VARIABLE: "plain"}, []),
        ({}, ["vllm's own"]),
        ({FILE_VARIABLE: f'operators = ["{A}"]'}, []),
        ({FILE_VARIABLE: f'[tenants.acme]\nkeys = ["{B}"]'}, []),
    ],
)
def test_with_any_key_a_server_listens_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], given: list[str]
) -> None:
    set_environment(monkeypatch, tmp_path, variables)
    with closing(open_tenants(tmp_path, None, given)) as tenants:
        assert tenant_of(tenants, "anything") == "nobody"


def test_tenants_of_before_keep_a_server_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, tmp_path, {KEY_VARIABLE: OPERATORS_KEY})
    with closing(open_tenants(tmp_path, None)) as tenants:
        tenants.add("acme", LIMITS)
    monkeypatch.delenv(KEY_VARIABLE)
    with closing(open_tenants(tmp_path, None)) as tenants:
        assert tenant_of(tenants, "anything") == "nobody"
