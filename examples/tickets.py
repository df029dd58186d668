"""Teach a served model to sort support tickets: the whole client in fifteen lines.

Start a server first:  zoact serve MODEL
Run again, this trains the same adapter further; to begin anew:  zoact delete acme/tickets
"""

from pathlib import Path

from zoact_remote import Adam, Basis, Client, Trainer, TwoPoint, evaluate, linear, load_jsonl, tasks

rows = tasks.BUILTIN["tickets"].rows(load_jsonl(Path(__file__).parent / "data" / "tickets.jsonl"))
training, held_out = rows[:384], rows[384:]

with Client() as client:  # at $ZOACT_URL, else http://127.0.0.1:8000
    adapter = client.create_adapter("acme/tickets", basis=Basis(positions="prompt"), exist_ok=True)
    adapter.calibrate(training[:64], exist_ok=True)
    print(f"version {adapter.version}:", evaluate(adapter, held_out).accuracy)
    Trainer(adapter, TwoPoint(), Adam(), linear(3e-3, steps=200), training, steps=200, seed=adapter.version).run()
    print(f"version {adapter.version}:", evaluate(adapter, held_out).accuracy)
    adapter.export("tickets-adapter")  # a PEFT directory
