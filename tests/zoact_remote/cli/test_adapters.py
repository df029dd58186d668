"""``zoact eval``, ``export``, ``audit``, ``rollback`` and ``adapters``: commands about adapters that there are."""

import json
from pathlib import Path

import pytest

from tests.support import KEY, Server, new_name, trained_adapter
from tests.zoact_remote.cli.support import HELD_OUT, RECORDS, TASK, figures, read_json, run, run_json
from zoact_remote import Adapter, Client, NotFound
from zoact_remote.cli.data import subset

ROWS, HELD_OUT_ROWS = TASK.rows(RECORDS), TASK.rows(HELD_OUT)


@pytest.fixture
def adapter(client: Client) -> Adapter:
    """An adapter at version 2."""
    adapter = trained_adapter(client, updates=2)
    adapter.refresh()
    return adapter


def test_eval_says_what_the_server_scores(data: str, adapter: Adapter) -> None:
    found = run_json("eval", data, "--adapter", adapter.name)
    expected = figures(adapter, ROWS, version=2)
    assert (found["adapter"], found["version"]) == (adapter.name, 2)
    assert {field: found[field] for field in expected} == expected

    some = subset(ROWS, 6)
    shown = run("eval", data, "--adapter", adapter.name, "--version", "0", "--rows", "6").stdout
    (line,) = (line for line in shown.splitlines() if f"{adapter.name}@0" in line)
    assert f"{adapter.scores(some, version=0).loss:.3f}" in line
    assert line.split()[-1] == "6"


def test_eval_takes_a_task_from_a_file(data: str, adapter: Adapter) -> None:
    Path("task.toml").write_text('template = "{text}"\ncompletion = " {label}"\n')
    rows = [{"prompt": record["text"], "completion": f" {record['label']}"} for record in RECORDS]
    found = run_json("eval", data, "--adapter", adapter.name, "--task", "task.toml")
    expected = figures(adapter, rows, version=2)
    assert {field: found[field] for field in expected} == expected
    assert (found["metric"], found["accuracy"]) == ("perplexity", None)
    assert found["perplexity"] > 1


def test_eval_generates_where_the_task_is_judged_by_text(adapter: Adapter) -> None:
    prompts = ["The parcel", "What a joy", "I cannot"]
    texts = [adapter.generate(prompt, max_tokens=4, version=1).text for prompt in prompts]
    lines = zip(prompts, [texts[0], "something else", texts[2]], strict=True)
    Path("data.jsonl").write_text("".join(json.dumps({"q": q, "answers": ["-", a]}) + "\n" for q, a in lines))
    task = 'template = "{q}"\ncompletion = "{answers}"\nmetric = "exact_match"\nmax_tokens = 4\nstop = ""\n'
    Path("task.toml").write_text(task)
    command = ("eval", "data.jsonl", "--adapter", adapter.name, "--task", "task.toml", "--version", "1")
    found = run_json(*command)
    assert (found["version"], found["metric"], found["rows"]) == (1, "exact_match", 3)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert 2 / 3 <= found["token_f1"] <= 1
    shown = run(*command).stdout
    assert "exact match" in shown
    assert "66.7%" in shown


def test_eval_on_conversations(adapter: Adapter) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Well?"), ("assistant", "Fine.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    Path("chat.jsonl").write_text(json.dumps({"messages": messages}))
    found = run_json("eval", "chat.jsonl", "--adapter", adapter.name)
    expected = adapter.scores([{"messages": messages[:2]}, {"messages": messages}])
    assert found["rows"] == 2
    assert found["loss"] == pytest.approx(expected.loss, abs=1e-4)


def test_eval_reads_csv(data: str, adapter: Adapter) -> None:
    lines = [f"{record['text']},{record['label']}" for record in RECORDS]
    Path("data.csv").write_text("\n".join(["text,label", *lines]))
    assert run_json("eval", "data.csv", "--adapter", adapter.name) == run_json("eval", data, "--adapter", adapter.name)


def test_export_writes_a_peft_directory(adapter: Adapter) -> None:
    made = run_json("export", adapter.name, "peft")
    assert made == {"adapter": adapter.name, "version": 2, "dtype": "float32", "directory": "peft"}
    assert read_json(Path("peft/adapter_config.json"))["r"] == adapter.info.rank
    about = read_json(Path("peft/zoact.json"))
    assert (about["version"], about["coefficients_digest"]) == (2, adapter.info.digest)
    full = Path("peft/adapter_model.safetensors").stat().st_size

    shown = run("export", adapter.name, "half", "--version", "1", "--dtype", "bfloat16").stdout
    assert f"{adapter.name}@1 is in half" in shown
    assert read_json(Path("half/zoact.json"))["version"] == 1
    assert Path("half/adapter_model.safetensors").stat().st_size < 0.7 * full


def test_export_leaves_other_files_alone(adapter: Adapter, tiny_model: Path) -> None:
    run("export", adapter.name, "exported")
    run("export", adapter.name, "exported", "--version", "0")
    Path("theirs").mkdir()
    theirs = Path("theirs/adapter_model.safetensors")
    theirs.write_text("precious")
    for target, merge in (("theirs", ()), ("exported", ("--merge", str(tiny_model)))):
        assert f"{target} holds other files" in run("export", adapter.name, target, *merge, code=1).stderr
    assert theirs.read_text() == "precious"


def test_audit_compares_journal_and_export(adapter: Adapter) -> None:
    found = run_json("audit", adapter.name)
    assert found == {
        "adapter": adapter.name,
        "version": 2,
        "digest": adapter.info.digest,
        "exact": True,
        "exported_version": None,
    }
    run("export", adapter.name, "first", "--version", "1")
    assert "holds the coefficients of version 1, to the bit" in run("audit", adapter.name, "--export", "first").stdout


def test_audit_fails_where_something_does_not_agree(adapter: Adapter) -> None:
    run("export", adapter.name, "peft")
    file = Path("peft/adapter_model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    error = run_json("audit", adapter.name, "--export", "peft", code=1)["error"]
    assert error["type"] == "CommandFailed"
    assert "1 of its checks failed" in error["message"]
    assert "lora_" in error["message"]
    file.write_bytes(content[:-1])
    assert run_json("audit", adapter.name, "--export", "peft", code=1)["error"]["type"] == "InvalidValue"
    run("export", adapter.name, "half", "--dtype", "bfloat16")
    assert "must be float32" in run("audit", adapter.name, "--export", "half", code=1).stderr


def test_rollback_returns_to_a_version(adapter: Adapter) -> None:
    first = next(iter(adapter.journal())).digest
    shown = run("rollback", adapter.name, "1").stdout
    assert shown == f"{adapter.name} is at version 3, which is version 1 again\n"
    assert adapter.refresh().digest == first
    made = run_json("rollback", adapter.name, "0")
    assert made == {"adapter": adapter.name, "version": 4, "rollback_to": 0, "digest": adapter.refresh().digest}
    assert run_json("rollback", adapter.name, "9", code=1)["error"]["type"] == "NotFound"
    assert adapter.refresh().version == 4


def test_adapters_are_listed(adapter: Adapter) -> None:
    (listed,) = (found for found in run_json("adapters")["adapters"] if found["name"] == adapter.name)
    assert (listed["version"], listed["state"], listed["digest"]) == (2, "ready", adapter.info.digest)
    assert adapter.name in run("adapters").stdout


@pytest.mark.parametrize("answer", ["n\n", ""])
def test_nothing_is_deleted_that_nobody_is_sure_of(adapter: Adapter, answer: str) -> None:
    refused = run("delete", adapter.name, code=1, answer=answer)
    assert f"delete {adapter.name}, which is at version 2, for good? [y/N]" in refused.stderr
    assert "is left as it is; --yes deletes it without asking" in " ".join(refused.stderr.split())
    assert adapter.refresh().version == 2


@pytest.mark.parametrize(("flags", "answer"), [(("--yes",), ""), ((), "y\n")])
def test_an_adapter_is_deleted(client: Client, adapter: Adapter, flags: tuple[str, ...], answer: str) -> None:
    assert run("delete", adapter.name, *flags, answer=answer).stdout.endswith(f"{adapter.name} is deleted\n")
    with pytest.raises(NotFound):
        client.adapter(adapter.name)
    assert run_json("delete", adapter.name, "--yes", code=1)["error"]["type"] == "NotFound"


def test_long_names_are_listed_whole(client: Client) -> None:
    adapter = client.create_adapter("acme-corporation/triage-of-support-tickets-in-production")
    assert adapter.name in run("adapters").stdout
    adapter.delete()


def test_the_api_key_is_sent(server_with_key: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = ("adapters", "--url", server_with_key.url)
    assert "no adapters" in run(*listing, "--api-key", KEY).stdout
    assert "a valid API key is needed" in run(*listing, "--api-key", "wrong", code=1).stderr
    monkeypatch.setenv("ZOACT_API_KEY", KEY)
    assert run_json(*listing) == {"adapters": []}


def test_import_makes_an_adapter_of_an_export(client: Client, adapter: Adapter, name: str) -> None:
    run("export", adapter.name, "peft")
    made = run_json("import", "peft", name)
    assert (made["name"], made["version"], made["digest"]) == (name, 0, adapter.info.digest)
    assert made["imported_digest"] == adapter.info.digest
    assert "imported" in run("adapters").stdout
    assert "every digest is that of the coefficients" in run("audit", name).stdout
    assert run_json("import", "peft", name, code=1)["error"]["code"] == "adapter_exists"
    Path("peft/adapter_model.safetensors").write_bytes(b"")
    assert "adapter_model.safetensors: is no safetensors file" in run("import", "peft", new_name(), code=1).stderr


def test_what_was_imported_is_trained_on(data: str, client: Client, adapter: Adapter, name: str) -> None:
    run("export", adapter.name, "peft")
    run("import", "peft", name)
    made = run_json("train", data, "--adapter", name, "--steps", "2", "--learning-rate", "0.01")
    assert list(made["results"]) == ["imported", "label_calibrated_imported", "tuned"]
    assert made["settings"]["rank"] == adapter.info.rank
    after = client.adapter(name)
    assert (after.info.version, after.info.imported_digest) == (2, adapter.info.digest)
    assert made["results"]["imported"]["loss"] == pytest.approx(adapter.scores(HELD_OUT_ROWS).loss, abs=1e-4)
    run("import", "peft", f"{name}-gaussian", "--noise", "gaussian")
    refused = run("train", data, "--adapter", f"{name}-gaussian", "--steps", "2", code=1).stderr
    assert "was imported for gaussian probes" in refused


def test_export_merges_into_a_checkpoint(adapter: Adapter, tiny_model: Path) -> None:
    made = run_json("export", adapter.name, "merged", "--merge", str(tiny_model))
    assert made == {"adapter": adapter.name, "version": 2, "directory": "merged", "checkpoint": str(tiny_model)}
    assert {path.name for path in tiny_model.iterdir()} < {path.name for path in Path("merged").iterdir()}
    both = run("export", adapter.name, "merged", "--merge", str(tiny_model), "--dtype", "float16", code=1)
    assert "a merged model has the types of its checkpoint" in both.stderr
    again = run("export", adapter.name, "twice", "--merge", "merged", code=1)
    assert "is not the checkpoint" in again.stderr
    assert not Path("twice").exists()
