"""What passes into vLLM's engine, with a client in its place that tells what it was given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ext.lanes import Lanes
from server_ext.tenants import calling
from server_ext.traffic import salted, watch

PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}
TENANTS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
SALTS = st.none() | st.text(min_size=1)


class Client:
    """What vLLM's ``EngineClient`` is to its routes: it answers one word after another, and may fail."""

    def __init__(self, words: int = 3, fails: bool = False) -> None:
        self.words, self.fails = words, fails
        self.asked: list[Any] = []
        self.under_way = 0

    async def generate(self, prompt: Any, *args: Any, **options: Any) -> AsyncIterator[int]:
        self.asked.append((prompt, args, options))
        self.under_way += 1
        try:
            for word in range(self.words):
                await asyncio.sleep(0)
                yield word
            if self.fails:
                raise ValueError("no such thing")
        finally:
            self.under_way -= 1


def salt_of(tenant: str | None, salt: str | None = None) -> str | None:
    token = calling.set(tenant)
    try:
        found: str | None = salted(PROMPT if salt is None else {**PROMPT, "cache_salt": salt}).get("cache_salt")
        return found
    finally:
        calling.reset(token)


@given(TENANTS, TENANTS, SALTS, SALTS)
def test_no_two_tenants_share_a_salt_and_one_shares_its_own(one: str, other: str, mine: Any, theirs: Any) -> None:
    assert (salt_of(one, mine) == salt_of(other, theirs)) == ((one, mine) == (other, theirs))


@given(TENANTS, SALTS)
def test_a_salt_is_one_that_vllm_takes_and_tells_nothing(tenant: str, salt: str | None) -> None:
    found = salt_of(tenant, salt)
    assert found is not None
    assert len(found) == 64
    assert set(found) <= set("0123456789abcdef")


@given(SALTS)
def test_the_operators_requests_stay_as_they_are(salt: str | None) -> None:
    assert salt_of(None, salt) == salt


@pytest.mark.parametrize("tenant", [None, "acme"])
def test_requests_are_handed_on_as_they_are_but_for_the_salt(tenant: str | None) -> None:
    async def scene() -> None:
        client = Client()
        background = watch(client, Lanes(1))
        calling.set(tenant)
        for generate in (client.generate, background):
            assert [word async for word in generate(PROMPT, "parameters", "name", priority=3)] == [0, 1, 2]
        wanted = PROMPT if tenant is None else {**PROMPT, "cache_salt": salt_of(tenant)}
        assert client.asked == 2 * [(wanted, ("parameters", "name"), {"priority": 3})]
        assert "cache_salt" not in PROMPT

    asyncio.run(scene())


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_is_foreground_to_the_end_of_its_answer(fails: bool) -> None:
    async def scene() -> None:
        client, lanes = Client(fails=fails), Lanes(1, quiet_s=0)
        watch(client, lanes)
        seen = []
        with suppress(ValueError):
            async for _ in client.generate(PROMPT):
                seen.append(lanes.busy)
        await asyncio.sleep(0.01)
        assert (seen, lanes.busy, client.under_way) == ([True, True, True], False, 0)

    asyncio.run(scene())


def test_a_request_that_is_given_up_is_given_up_in_vllm() -> None:
    async def scene() -> None:
        client, lanes = Client(words=99), Lanes(1, quiet_s=0)
        watch(client, lanes)

        async def listen() -> None:
            async for _ in client.generate(PROMPT):
                pass

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)
        assert (lanes.busy, client.under_way) == (True, 1)
        listening.cancel()
        await asyncio.wait([listening])
        assert client.under_way == 0
        async with aclosing(client.generate(PROMPT)) as words:  # type: ignore[type-var]
            await anext(words)
            assert client.under_way == 1
        assert client.under_way == 0
        await asyncio.sleep(0.01)
        assert not lanes.busy

    asyncio.run(scene())


def test_training_is_no_foreground_nor_is_what_was_never_asked() -> None:
    async def scene() -> None:
        client, lanes = Client(), Lanes(1)
        background = watch(client, lanes)
        client.generate(PROMPT)
        async for _ in background(PROMPT):
            assert not lanes.busy
        assert not lanes.busy

    asyncio.run(scene())
