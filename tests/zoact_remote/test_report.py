"""The report: one file that stands alone, shows what happened and trusts no text."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from zoact_remote.charts import MOST_POINTS, ticks
from zoact_remote.evaluation import Evaluation
from zoact_remote.history import History, StepRecord
from zoact_remote.report import (
    MOST_CHANGES,
    Change,
    changed_answers,
    figure_text,
    results_cells,
    running_mean,
    write_report,
)

RESULTS = {
    "zero-shot": {"accuracy": 0.5, "loss": 1.25, "rows": 100},
    "tuned": {"accuracy": 0.8, "loss": 0.5, "rows": 100},
}


def evaluation(version: int, accuracy: float | None = 0.5) -> Evaluation:
    return Evaluation(version, 1.0 / (1 + version), accuracy, accuracy, (), (), 10)


def history(steps: int, *, every: int = 10, accuracy: float | None = 0.5) -> History:
    made = History(baseline=evaluation(0, accuracy))
    for i in range(steps):
        found = evaluation(i + 1, accuracy) if (i + 1) % every == 0 else None
        made.steps.append(StepRecord(i, i, 1.0 / (1 + i), ((i, 3.0), (i + 1, -4.0)), 1e-3, 0.01, 100, 0.5, 0.4, found))
    return made


def written(tmp_path: Path, run: History, **changes: object) -> str:
    arguments: dict[str, Any] = {"title": "acme/triage", "settings": {"rank": 4}, "history": run, "results": RESULTS}
    return write_report(tmp_path / "made" / "report.html", **arguments | changes).read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Checks that every element is closed where it should be."""

    VOID = frozenset({"meta", "line", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        # html.parser reports <line/> as start and end; a circle with a title has an end tag of its own.
        if tag not in self.VOID or self.get_starttag_text() is None:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    page = written(tmp_path, history(30))
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not {"script", "link", "img", "iframe"} & set(balance.seen)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_shows_curves_results_and_settings(tmp_path: Path) -> None:
    page = written(tmp_path, history(30), settings={"rank": 4, "learning rate": 1e-3, "eval every": None})
    assert re.findall(r"<figcaption><h2>([^<]*)", page) == [
        "Training loss",
        "Evaluation accuracy",
        "Evaluation loss",
        "Slope along the probe, |g|",
        "Learning rate",
        "Tokens",
    ]
    assert "30 steps · 3,000 tokens · 15 s · 200 tokens/s" in page
    assert "80.0% ± 4.0" in page
    assert "+30.0 points" in page
    assert '<th scope="row">learning rate</th><td>0.001</td>' in page
    assert '<th scope="row">eval every</th><td>-</td>' in page
    # The evaluation before the first step, and those of steps 10, 20 and 30.
    assert re.findall(r"<title>step (\d+): 50.0%", page) == ["0", "10", "20", "30"]


def test_escapes_everything(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>&\""
    run = history(1)
    run.stopped = evil
    page = written(
        tmp_path,
        run,
        title=evil,
        settings={evil: evil},
        results={evil: {"rows": evil}},
        changes=[Change(evil, evil, evil, evil)],
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&amp;&quot;") == 11


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_short_runs(tmp_path: Path, steps: int) -> None:
    page = written(tmp_path, history(steps), results={})
    assert page.count("<svg") == (6 if steps else 2)
    assert "nan" not in page.lower()


def test_shows_where_a_run_went_back(tmp_path: Path) -> None:
    run = history(5)
    run.steps[2] = replace(run.steps[2], loss=math.nan, terms=(), learning_rate=0.0, returned_to=1)
    run.kept = 0
    page = written(tmp_path, run)
    assert "<title>step 2: returned to version 1</title>" in page
    cells = re.findall(r"<td>([^<]*)</td>", page.partition("Returns to earlier versions")[2])
    assert cells == ["2", "2", "1", "0.001", "end", "-", "0", "-"]
    assert "Returns to earlier versions" not in written(tmp_path, history(5))


def test_shows_answers_that_changed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"film {i}", "choices": [" bad", " good"], "answer": i % 2} for i in range(200)
    ]
    before = replace(evaluation(0), predictions=(0,) * 200)
    after = replace(evaluation(1), predictions=(1,) * 150 + (0,) * 50)
    changes = changed_answers(rows, before, after)
    assert len(changes) == 150
    assert changes[3] == Change("film 3", " good", " bad", " good")
    page = written(tmp_path, history(1), changes=changes)
    assert "150 held-out rows: 75 became right, 75 wrong; the first 50 are shown." in page
    assert page.count("<td>film ") == MOST_CHANGES
    assert changed_answers(rows, before, None) == []
    text = [{"prompt": "a", "completion": "b"}]
    unscored = replace(before, predictions=(None,))
    assert changed_answers(text, unscored, unscored) == []


def test_completion_tasks_have_losses_only(tmp_path: Path) -> None:
    results = {"zero-shot": {"accuracy": None, "loss": 2.0, "rows": 9}, "tuned": {"accuracy": None, "loss": 1.5}}
    page = written(tmp_path, history(20, accuracy=None), results=results)
    assert "Evaluation accuracy" not in page
    assert "loss, nats · -0.500" in page


@pytest.mark.parametrize(
    ("metric", "values", "shown", "gain"),
    [
        ("macro_f1", (0.25, 0.5), "50.0%", "macro f1 · +25.0 points"),
        ("exact_match", (0.0, 0.125), "12.5%", "exact match · +12.5 points"),
        ("perplexity", (30.0, 12.5), "12.50", "perplexity · -17.50"),
    ],
)
def test_the_figure_that_a_task_is_judged_by(
    tmp_path: Path, metric: str, values: tuple[float, float], shown: str, gain: str
) -> None:
    results = {name: {metric: value, "loss": 1.0} for name, value in zip(("zero-shot", "tuned"), values, strict=True)}
    run = history(10)
    run.steps[-1] = replace(run.steps[-1], evaluation=replace(evaluation(10), **{metric: values[1]}))  # type: ignore[arg-type]
    page = written(tmp_path, run, results=results, metric=metric)
    assert f"<strong>{shown}</strong>" in page
    assert gain in page
    assert f"<h2>Evaluation {metric.replace('_', ' ')}</h2>" in page
    assert "Evaluation accuracy" not in page


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = History(
        steps=[StepRecord(i, i, loss, ((1, 1.0),), 1.0, 0.01, 1, 0.1, 0.1) for i, loss in enumerate((1.0, math.nan))]
    )
    assert "nan" not in written(tmp_path, run).lower()


def test_long_runs_make_small_files(tmp_path: Path) -> None:
    page = written(tmp_path, history(20_000, every=20_001))
    assert page.count('class="dot"') == 2 * MOST_POINTS
    assert len(page) < 300_000


def test_running_mean_is_of_the_last_steps() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]
    assert running_mean([]) == []


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 1.0),
        (0.31, 0.84),
        (5.0, 5.0),
        (0.0, 0.0),
        (-3e-7, 2e-7),
        (12.0, 48_000.0),
        (0.1 + 0.2, 0.3),
        (1e9, 1e9 + 1e-6),
        (0.0, 5e-324),
    ],
)
def test_ticks_are_few_round_and_around_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    gap = found[1] - found[0]
    assert 2 <= len(found) <= 8
    assert found[0] <= low + 1e-6 * gap
    assert found[-1] >= high - 1e-6 * gap
    assert round(gap / 10.0 ** math.floor(math.log10(gap) + 1e-9), 6) in (1, 2, 5)


def test_figures() -> None:
    assert figure_text("accuracy", {"accuracy": 0.9, "rows": 100}) == "90.0% ± 3.0"
    assert figure_text("accuracy", {"accuracy": 0.9}) == "90.0%"
    assert figure_text("accuracy", {}) == "-"
    assert figure_text("token_f1", {"token_f1": 0.25, "rows": 100}) == "25.0%"
    assert figure_text("perplexity", {"perplexity": 12.3456}) == "12.35"
    assert figure_text("loss", {"loss": 0.41234}) == "0.412"
    assert figure_text("loss", {"loss": None}) == "-"


def test_a_table_has_the_figures_that_there_are() -> None:
    results: dict[str, dict[str, Any]] = {
        "a": {"loss": 1.0, "token_f1": None, "perplexity": 2.0},
        "b": {"token_f1": 0.5, "rows": 3},
    }
    heads, lines = results_cells(results)
    assert heads == ["token f1", "perplexity", "loss", "rows"]
    assert lines == [("a", "-", "2.00", "1.000", "-"), ("b", "50.0%", "-", "-", "3")]
