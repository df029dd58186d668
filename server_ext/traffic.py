"""Requests on their way into vLLM's engine: whose they are, and what they go before.

All of vLLM's routes, whatever their version, give requests to the engine by one method of one client. What passes there
is foreground (``server_ext.lanes``), from then until its answer has ended: calls that are refused never come so far.

Tenants share the base model, and vLLM would share what it has cached of it: by the time to a first token one could tell
whether another has sent some text. So a tenant's requests are salted with its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from server_ext.lanes import Lanes
from server_ext.tenants import calling

Generate = Callable[..., AsyncGenerator[Any, None]]


def watch(client: Any, lanes: Lanes) -> Generate:
    """Has what vLLM's routes ask of its ``EngineClient`` pass here, and returns the way in for training.

    vLLM has no door for this, so the one instance that its routes share gets another ``generate``.
    """
    stock: Generate = client.generate

    def background(prompt: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        return stock(salted(prompt), *args, **options)

    async def foreground(prompt: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        with lanes.foreground():
            async with aclosing(background(prompt, *args, **options)) as outputs:
                async for output in outputs:
                    yield output

    client.generate = foreground
    return background


def salted(prompt: Mapping[str, Any]) -> Mapping[str, Any]:
    """A prompt whose cached blocks its tenant alone finds, by the salt that the request has besides.

    The operator's stay as they are. vLLM takes no salt of every form, so it is a digest, which tells nothing either.
    """
    tenant = calling.get()
    if tenant is None:
        return prompt
    # No tenant's name holds a line break.
    salt = f"{tenant}\n{prompt.get('cache_salt') or ''}"
    return {**prompt, "cache_salt": hashlib.sha256(salt.encode(errors="surrogatepass")).hexdigest()}
