r"""Teach a small model to answer in valid JSON, by a reward alone: no example of a right answer is shown to it.

SmolLM2-135M-Instruct, asked for JSON, mostly writes something near it, such as a comma too many before the last brace.
Start a server first:  zoact serve MODEL
The reward needs:      pip install 'zoact-remote[json]'
Run again, this trains the same adapter further; to begin anew:  zoact delete acme/json

With vLLM on two CPU cores a step takes 4 s. The first run printed:

    version 0: mean reward 0.606, 6 of 24 valid, such as '{\n  "name": "Kira",\n  "age": 47,\n}'
    version 40: mean reward 0.933, 21 of 24 valid, such as '{\n  "name": "Kira",\n  "age": 47\n}'
"""

import random

from zoact_remote import Adam, Basis, ChatRow, Client, Rewarded, Trainer, TwoPoint, linear
from zoact_remote.rewards import valid_json

STEPS = 40
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mona")
CITIES = ("Oslo", "Lima", "Rome", "Paris", "Cairo", "Dublin", "Madrid", "Tokyo")
FORMS = (
    "{name}, who is {age}, lives in {city}.",
    "{name} moved to {city} at the age of {age}.",
    "Our office in {city} has hired {name}, aged {age}.",
    "At {age}, {name} still works as a nurse in {city}.",
    "{city} is where {name} opened a bakery, at {age}.",
    "{name} turned {age} last week and flew home to {city}.",
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def question(draw: random.Random) -> ChatRow:
    facts = {"name": draw.choice(NAMES), "age": draw.randint(19, 70), "city": draw.choice(CITIES)}
    return {
        "messages": [
            {"role": "user", "content": f"Extract name and age as JSON.\n{draw.choice(FORMS).format(**facts)}"},
            # For the basis, which wants a whole conversation. The model is not shown it when it writes.
            {"role": "assistant", "content": "{}"},
        ]
    }


draw = random.Random(0)
rows = [question(draw) for _ in range(88)]
training, held_out = rows[:64], rows[64:]

with Client() as client:
    adapter = client.create_adapter("acme/json", basis=Basis(positions="both"), exist_ok=True)
    adapter.calibrate(training, exist_ok=True)
    writer = Rewarded(adapter, valid_json(SCHEMA), max_tokens=24)

    def show(when: str) -> None:
        found = writer.evaluate(held_out)
        valid = sum(reward == 1.0 for reward in found.rewards)
        print(f"{when}: mean reward {found.reward:.3f}, {valid} of {len(held_out)} valid, such as {found.texts[0]!r}")

    show(f"version {adapter.version}")
    Trainer(
        writer,
        TwoPoint(epsilon=2.0**-7),
        Adam(),
        linear(2e-3, STEPS),
        training,
        steps=STEPS,
        batch_size=8,
        seed=adapter.version,
        callbacks=[lambda run, record: print(f"step {record.step}: mean reward {-record.loss:.3f}", flush=True)],
    ).run()
    show(f"version {adapter.version}")
