"""What ``zoact top`` makes of ``/metrics``, against Prometheus' own client library."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from zoact_remote.cli.figures import Between, Figures

BOUNDS = (0.1, 1.0, 10.0)
NOTHING = Figures({})


def text_of(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


@given(series=st.dictionaries(st.tuples(st.text(), st.text('"\\\n{} 1,=n')), st.floats(allow_nan=False), max_size=8))
def test_text_is_read_as_it_was_written(series: dict[tuple[str, str], float]) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("zoact_g", "About\nit", ["one", "other"], registry=registry)
    for labels, value in series.items():
        gauge.labels(*labels).set(value)
    figures = Figures.parse(text_of(registry))
    for (one, other), value in series.items():
        assert figures.sum("zoact_g", one=one, other=other) == value
    assert figures.label("zoact_g", "other") == {other for _, other in series}
    (family,) = text_string_to_metric_families(text_of(registry))
    assert len(family.samples) == len(series)


@given(first=st.integers(0, 100), more=st.integers(0, 100))
def test_a_counter_that_fell_began_again(first: int, more: int) -> None:
    def look(value: int) -> Figures:
        registry = CollectorRegistry()
        counter = Counter("zoact_c", "", ["tenant"], registry=registry)
        counter.labels("acme").inc(value)
        counter.labels("umbra").inc(1)
        return Figures.parse(text_of(registry))

    assert Between(look(first), look(first + more), 4.0).rate("zoact_c_total", tenant="acme") == more / 4
    assert Between(NOTHING, look(first), 1.0).growth("zoact_c_total") == first + 1
    if more:
        assert Between(look(first + more), look(first), 1.0).growth("zoact_c_total", tenant="acme") == first
    assert Between(look(first), NOTHING, 1.0).growth("zoact_c_total") is None


@given(
    before=st.lists(st.floats(0, 20), max_size=20),
    seconds=st.lists(st.floats(0, 20), min_size=1, max_size=40),
    share=st.sampled_from([0.5, 0.95]),
)
def test_a_quantile_lies_in_the_bucket_of_the_true_one(before: list[float], seconds: list[float], share: float) -> None:
    registry = CollectorRegistry()
    histogram = Histogram("zoact_h_seconds", "", ["tenant"], buckets=BOUNDS, registry=registry)
    for value in before:
        histogram.labels("acme").observe(value)
    first = Figures.parse(text_of(registry))
    for value in seconds:
        histogram.labels("acme").observe(value)
        histogram.labels("umbra").observe(100)
    between = Between(first, Figures.parse(text_of(registry)), 1.0)
    found = between.quantile("zoact_h_seconds", share, tenant="acme")
    true = sorted(seconds)[math.ceil(share * len(seconds)) - 1]
    low, high = next((a, b) for a, b in zip((0.0, *BOUNDS), (*BOUNDS, math.inf), strict=True) if true <= b)
    assert found is not None
    assert low <= found <= min(high, BOUNDS[-1])
    assert between.quantile("zoact_h_seconds", share, tenant="nobody") is None
    assert between.quantile("zoact_none_seconds", share) is None


def test_it_is_interpolated_as_prometheus_does() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("zoact_h_seconds", "", buckets=BOUNDS, registry=registry)
    for _ in range(4):
        histogram.observe(0.5)
    between = Between(NOTHING, Figures.parse(text_of(registry)), 1.0)
    assert between.quantile("zoact_h_seconds", 0.5) == pytest.approx(0.1 + 0.9 / 2)
