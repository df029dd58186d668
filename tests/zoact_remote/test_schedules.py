"""Learning rates at the steps that matter."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoact_remote import InvalidValue, constant, cosine, linear


def test_constant() -> None:
    assert [constant(0.5)(step) for step in (0, 7, 10**6)] == [0.5] * 3


def test_linear() -> None:
    rate = linear(1.0, 10)
    assert [rate(0), rate(5), rate(9), rate(10), rate(11)] == pytest.approx([1.0, 0.5, 0.1, 0.0, 0.0])


def test_cosine() -> None:
    rate = cosine(1.0, 10, final=0.2)
    assert [rate(0), rate(5), rate(10), rate(11)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


@settings(max_examples=50)
@given(st.sampled_from([linear, cosine]), st.integers(0, 20), st.integers(1, 50), st.floats(0.0, 1.0))
def test_up_in_equal_steps_then_down(decay: object, warmup: int, rest: int, final: float) -> None:
    rate = decay(2.0, warmup + rest, warmup=warmup, final=final)  # type: ignore[operator]
    rates = [rate(step) for step in range(warmup + rest)]
    assert rates[:warmup] == pytest.approx([2.0 * (i + 1) / warmup for i in range(warmup)])
    assert rates[warmup] == pytest.approx(2.0)
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    assert rates[-1] > final or rest == 1


@settings(max_examples=50)
@given(st.sampled_from([linear, cosine]), st.integers(0, 20), st.permutations(range(50)))
def test_a_resumed_run_has_the_rates_of_a_straight_one(decay: object, warmup: int, order: list[int]) -> None:
    straight, resumed = (decay(2.0, 50, warmup=warmup) for _ in range(2))  # type: ignore[operator]
    rates = [straight(step) for step in range(50)]
    assert {step: resumed(step) for step in order} == dict(enumerate(rates))


def test_warmup_of_a_constant_rate() -> None:
    rate = constant(1.0, warmup=4)
    assert [rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: constant(-1.0), "learning_rate"),
        (lambda: constant(float("nan")), "learning_rate"),
        (lambda: constant(1.0, warmup=-1), "warmup"),
        (lambda: linear(1.0, 10, final=-0.1), "final"),
        (lambda: cosine(1.0, 10, warmup=10), "steps"),
    ],
)
def test_settings_are_checked(make: object, param: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        make()  # type: ignore[operator]
    assert caught.value.param == param
