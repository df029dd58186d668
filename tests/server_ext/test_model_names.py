"""Model names say exactly what they stand for."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server_ext.errors import ApiError
from server_ext.model_names import ModelName
from server_ext.schemas import SignedProbe
from tests.strategies import SEEDS
from zoact_remote.wire.values import NAME

NAMES = st.from_regex(NAME, fullmatch=True)
EPSILONS = st.floats(0, 1, exclude_min=True)


@st.composite
def model_names(draw: st.DrawFn) -> ModelName:
    adapter = f"{draw(NAMES)}/{draw(NAMES)}"
    version = draw(st.none() | st.integers(0, 2**63))
    probe = None
    if version is not None and draw(st.booleans()):
        probe = SignedProbe(seed=draw(SEEDS), epsilon=draw(EPSILONS), sign=draw(st.sampled_from((1, -1))))
    return ModelName(adapter, version, probe)


@given(model_names())
def test_a_name_comes_back_from_its_text(name: ModelName) -> None:
    assert ModelName.parse(str(name)) == name


@given(st.text(max_size=40) | st.from_regex(r"acme/triage[@+*][0-9+*@.e-]*", fullmatch=True))
@example("acme/triage@\u0663")
@example("acme/triage@1+1*\u0660.5")
@example("acme/triage@1\n")
@example("acme/triage\n")
def test_any_text_is_a_name_or_nothing_or_refused(text: str) -> None:
    refused = name = None
    try:
        name = ModelName.parse(text)
    except ApiError as error:
        refused = error
    assert refused is None or (refused.status, refused.param) == (400, "model")
    # One text for one name, save for how a decimal number may be written.
    assert name is None or str(name) == text or (name.probe is not None and ModelName.parse(str(name)) == name)


@pytest.mark.parametrize(
    ("text", "epsilon"),
    [("0.01", 0.01), ("1", 1.0), ("1e-3", 1e-3), ("7.8125E-03", 2**-7), ("5e-324", 5e-324)],
)
@pytest.mark.parametrize("sign", ["+", "-"])
def test_epsilon_is_a_decimal_number(text: str, epsilon: float, sign: str) -> None:
    name = ModelName.parse(f"acme/triage@41{sign}17*{text}")
    assert name is not None
    assert name.version == 41
    assert name.probe == SignedProbe(seed=17, epsilon=epsilon, sign=1 if sign == "+" else -1)


@pytest.mark.parametrize("text", ["", "acme", "acme/", "/triage", "Acme/triage", "acme/a/b", "meta-llama/Llama-3@main"])
def test_names_of_other_models_are_left_alone(text: str) -> None:
    assert ModelName.parse(text) is None


def test_a_minus_without_a_version_is_part_of_the_name() -> None:
    assert ModelName.parse("acme/triage-17") == ModelName("acme/triage-17")


@pytest.mark.parametrize(
    "rest",
    [
        "@",
        "@newest",
        "@-1",
        "@1.5",
        "@01",
        "@1 ",
        f"@{10**20}",
        "+17*0.01",
        "-17*0.01",
        "*0.01",
        "@1+17",
        "@1*0.01",
        "@1+*0.01",
        "@1+-17*0.01",
        "@1+17*",
        "@1+17*-0.01",
        "@1+17*0.01*2",
        "@1+17*nan",
        "@1+17*0",
        "@1+17*1.5",
        "@1+17*1e999",
        "@1+17*1e-999",
        f"@1+{2**64}*0.01",
        "@1+17*0.01+18*0.01",
    ],
)
def test_what_follows_an_adapters_name_is_a_version_or_a_probe(rest: str) -> None:
    with pytest.raises(ApiError) as caught:
        ModelName.parse(f"acme/triage{rest}")
    assert (caught.value.status, caught.value.param) == (400, "model")
