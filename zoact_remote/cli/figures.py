"""A server's figures as ``/metrics`` has them, and what they say of the time between two looks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

Labels = frozenset[tuple[str, str]]

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")


class Figures:
    """One look: values by name and labels."""

    def __init__(self, series: Mapping[str, Mapping[Labels, float]]) -> None:
        self._series = series

    @classmethod
    def parse(cls, text: str) -> Figures:
        """Prometheus' text format, without time stamps. Comments and lines that are none of it are passed over."""
        series: dict[str, dict[Labels, float]] = {}
        for line in text.split("\n"):
            found = _SAMPLE.match(line)
            if found is not None:
                name, labels, value = found.groups()
                pairs = frozenset((key, _unescaped(text)) for key, text in _LABEL.findall(labels or ""))
                series.setdefault(name, {})[pairs] = float(value)
        return cls(series)

    def sum(self, name: str, **labels: str) -> float | None:
        """The sum over all series with these labels; None if the server has no metric of that name."""
        if name not in self._series:
            return None
        wanted = labels.items()
        return math.fsum(value for found, value in self._series[name].items() if wanted <= found)

    def label(self, name: str, label: str) -> set[str]:
        """The values that a label of a metric has."""
        return {value for labels in self._series.get(name, ()) for key, value in labels if key == label}


class Between:
    """Two looks, some seconds apart."""

    def __init__(self, first: Figures, last: Figures, seconds: float) -> None:
        self._first = first
        self.last = last
        self._seconds = seconds

    def growth(self, name: str, **labels: str) -> float | None:
        """How much a counter has grown; None if there is none of that name. One that fell began again at zero."""
        last = self.last.sum(name, **labels)
        if last is None:
            return None
        first = self._first.sum(name, **labels) or 0.0
        return last - first if last >= first else last

    def rate(self, name: str, **labels: str) -> float | None:
        """A counter's growth a second."""
        growth = self.growth(name, **labels)
        return None if growth is None else growth / self._seconds

    def quantile(self, name: str, share: float, **labels: str) -> float | None:
        """A quantile of what a histogram has seen between the looks, as Prometheus estimates it; None if nothing."""
        bounds = sorted((float(bound), bound) for bound in self.last.label(f"{name}_bucket", "le"))
        counts = [self.growth(f"{name}_bucket", le=bound, **labels) or 0.0 for _, bound in bounds]
        if not counts or not counts[-1]:
            return None
        wanted = share * counts[-1]
        at = next(i for i, count in enumerate(counts) if count >= wanted)
        low, below = (bounds[at - 1][0], counts[at - 1]) if at else (0.0, 0.0)
        high = bounds[at][0]
        if math.isinf(high):
            return low
        # Rounded, the sum may lie beyond the bucket.
        return min(high, low + (high - low) * (wanted - below) / (counts[at] - below))


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], text)
