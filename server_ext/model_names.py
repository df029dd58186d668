"""Versions and probes of adapters as model names::

    tenant/adapter                        the newest version
    tenant/adapter@VERSION                a version
    tenant/adapter@VERSION+SEED*EPSILON   one side of a probe around it; the other has a minus

A probe names its version: the newest may change between the two sides, and their difference would then tell nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import ValidationError

from server_ext.errors import invalid
from server_ext.schemas import SignedProbe
from zoact_remote.wire.values import NAME

_NUMBER = r"0|[1-9][0-9]{0,19}"
_OURS = re.compile(rf"(?P<adapter>{NAME}/{NAME})(?P<rest>[@+*].*)?", re.DOTALL)
_REST = re.compile(
    rf"@(?P<version>{_NUMBER})"
    rf"(?:(?P<sign>[+-])(?P<seed>{_NUMBER})\*(?P<epsilon>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?))?"
)


@dataclass(frozen=True)
class ModelName:
    """What a model name stands for.

    Attributes:
        adapter: ``tenant/adapter``.
        version: None for the newest.
        probe: around that version; None for none, and always where no version is named.

    """

    adapter: str
    version: int | None = None
    probe: SignedProbe | None = None

    def __str__(self) -> str:
        version = "" if self.version is None else f"@{self.version}"
        if self.probe is None:
            return f"{self.adapter}{version}"
        sign = "+" if self.probe.sign > 0 else "-"
        return f"{self.adapter}{version}{sign}{self.probe.seed}*{self.probe.epsilon!r}"

    @classmethod
    def parse(cls, name: str) -> ModelName | None:
        """What a name stands for; None if it is not of this form, and so perhaps another model's.

        Raises:
            ApiError: an adapter's name is followed by what is neither a version nor a probe (400).

        """
        ours = _OURS.fullmatch(name)
        if ours is None:
            return None
        adapter, rest = ours["adapter"], ours["rest"]
        if rest is None:
            return cls(adapter)
        found = _REST.fullmatch(rest)
        if found is None:
            raise invalid("model", "an adapter's name is followed by @VERSION, @VERSION+SEED*EPSILON or nothing")
        version = int(found["version"])
        if found["seed"] is None:
            return cls(adapter, version)
        sign = 1 if found["sign"] == "+" else -1
        try:
            probe = SignedProbe(seed=int(found["seed"]), epsilon=float(found["epsilon"]), sign=sign)
        except ValidationError as error:
            first = error.errors()[0]
            raise invalid("model", f"{first['loc'][0]}: {first['msg']}") from None
        return cls(adapter, version, probe)
