"""``zoact eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from zoact_remote.cli import options
from zoact_remote.cli.output import reporting, results_table


def evaluate(
    data: options.Data,
    adapter: options.AdapterName,
    version: options.Version = None,
    task: options.TaskName = None,
    template: options.Template = None,
    label: options.Labels = None,
    completion: options.Completion = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    rows: Annotated[
        int | None, typer.Option(help="Evaluate this many, evenly spaced; all if not given.", min=1)
    ] = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Evaluate a version of an adapter on records.

    zoact train leaves its task beside its results: give it again with --task runs/NAME/task.json.
    """
    with reporting(as_json) as output:
        from zoact_remote.cli.data import make_task, spread
        from zoact_remote.evaluation import evaluate as score
        from zoact_remote.tasks import load_jsonl

        made = make_task(
            load_jsonl(data),
            task=task,
            template=template,
            labels=label,
            completion=completion,
            text_field=text_field,
            label_field=label_field,
        )
        sample = made.load_rows(data)
        if rows is not None:
            sample = spread(sample, rows)
        with options.connect(url, api_key) as client, output.waiting(f"evaluating {len(sample):,} rows"):
            found = score(client.adapter(adapter), sample, version=version)
        results = {f"{adapter}@{found.version}": found.to_json()}
        if found.calibrated_accuracy is not None:
            results["label-calibrated"] = {"accuracy": found.calibrated_accuracy, "rows": len(sample)}
        output.result({"adapter": adapter} | found.to_json(), results_table(results))
