"""The live curve, on a display that remembers what it showed."""

import math
import sys
import types
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from tests.zoact_remote.regression import ROWS, Regression, trainer
from zoact_remote import History, LiveCurve, StepRecord
from zoact_remote.charts import MOST_POINTS
from zoact_remote.notebook import curve


class Screen:
    """``IPython.display``, as far as it is used."""

    def __init__(self) -> None:
        self.cells: list[list[str]] = []

    @staticmethod
    def HTML(html: str) -> str:  # noqa: N802
        return html

    def display(self, picture: str, *, display_id: bool) -> Any:
        assert display_id
        self.cells.append([picture])
        return types.SimpleNamespace(update=self.cells[-1].append)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    package, found = types.ModuleType("IPython"), Screen()
    package.display = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    return found


def parts(html: str) -> tuple[str, list[ET.Element]]:
    """What a picture says, and what it draws."""
    words, svg = ET.fromstring(html)
    return words.text or "", list(svg)


def test_one_cell_is_drawn_again_and_again(screen: Screen) -> None:
    trainer(Regression(), eval_rows=ROWS, eval_every=10, callbacks=[LiveCurve(every_s=0)]).run()
    (pictures,) = screen.cells
    assert len(pictures) == 31
    said, drawn = parts(pictures[6])
    assert said.startswith("step 7 of 30 · loss ")
    assert sum(mark.tag == "circle" for mark in drawn) == 7 + 1
    said, drawn = parts(pictures[-1])
    assert said.startswith("step 30 of 30 · loss ")
    assert "held-out loss" in said
    assert sum(mark.tag == "circle" for mark in drawn) == 30 + 4


def test_it_draws_no_oftener_than_it_is_told(screen: Screen) -> None:
    callback = LiveCurve(every_s=1e6)
    trainer(Regression(), callbacks=[callback]).run()
    trainer(Regression(), callbacks=[callback]).run()
    assert [len(pictures) for pictures in screen.cells] == [2, 1]


def test_without_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises(ImportError):
        LiveCurve()


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(step, step, loss, ((1, 0.5),), 0.1, 0.1, 8, 0.1, 0.1)


@pytest.mark.parametrize(
    "losses",
    [[], [1.0], [1.0, 1.0], [math.nan], [1.0, math.inf, 2.0], [float(i % 7) for i in range(5 * MOST_POINTS + 1)]],
)
def test_any_history_can_be_drawn(losses: list[float]) -> None:
    history = History(steps=[record(i, loss) for i, loss in enumerate(losses)], stopped="<enough>")
    said, drawn = parts(curve(history, len(losses) + 1))
    assert said.startswith(f"step {len(losses):,} of {len(losses) + 1:,}")
    assert said.endswith("stopped: <enough>")
    finite = sum(map(math.isfinite, losses))
    dots = [mark for mark in drawn if mark.tag == "circle"]
    assert len(dots) == finite if finite <= MOST_POINTS else MOST_POINTS / 2 < len(dots) <= MOST_POINTS
    for dot in dots:
        assert 0 <= float(dot.attrib["cx"]) <= 640
        assert 0 <= float(dot.attrib["cy"]) <= 220
