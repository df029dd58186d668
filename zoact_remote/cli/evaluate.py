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
        int | None, typer.Option(help="Evaluate this many records, always the same ones; all if not given.", min=1)
    ] = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Evaluate a version of an adapter on records.

    Where the task is judged by what the model writes, text is generated for every record, too.

    zoact train leaves its task beside its results: give it again with --task runs/NAME/task.toml.
    """
    with reporting(as_json) as output:
        from zoact_remote.cli.data import make_task, subset
        from zoact_remote.evaluation import evaluate_task
        from zoact_remote.tasks import load_records

        records = load_records(data)
        made = make_task(
            records,
            task=task,
            template=template,
            labels=label,
            completion=completion,
            text_field=text_field,
            label_field=label_field,
        )
        sample = records if rows is None else subset(records, rows)
        with options.connect(url, api_key) as client, output.waiting(f"evaluating {len(sample):,} records"):
            found = evaluate_task(client.adapter(adapter), made, sample, version=version)
        figures = found.to_json()
        results = {f"{adapter}@{found.version}": figures}
        if found.calibrated_accuracy is not None:
            results["label-calibrated"] = {"accuracy": found.calibrated_accuracy, "rows": len(sample)}
        output.result({"adapter": adapter, "metric": made.metric} | figures, results_table(results))
