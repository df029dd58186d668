"""Training through a bad network ends where training over a good one does."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.soak.chaos_proxy import FAULTS, bad_network
from tests.support import CALL_TIMEOUT_S, ROWS, Servers, new_name
from zoact_remote import Adam, Basis, Client, History, Trainer, TwoPoint

SEEDS = range(3)


def trained(client: Client) -> tuple[str | None, History]:
    """A run from nothing to a trained adapter, which makes every kind of call: its digest, and what it did."""
    adapter = client.create_adapter(new_name(), rank=2, basis=Basis(positions="both"), exist_ok=True)
    adapter.calibrate(ROWS, exist_ok=True)
    # Something every few steps that sends the update by itself.
    history = Trainer(
        adapter, TwoPoint(), Adam(), 0.01, ROWS, steps=25, batch_size=2, eval_rows=ROWS[:2], eval_every=5
    ).run()
    return adapter.refresh().digest, history


def test_training_through_a_bad_network(servers: Servers) -> None:
    server = servers("transformers")
    with server.client() as client:
        digest, straight = trained(client)
    happened: Counter[str] = Counter()
    for seed in SEEDS:
        with (
            bad_network(server.url, seed=seed) as network,
            Client(network.url, timeout=CALL_TIMEOUT_S) as client,
            pytest.MonkeyPatch.context() as patch,
        ):
            # Pauses between attempts are tested with the transport; here they only take time.
            patch.setattr(client._transport, "_sleep", lambda seconds: None)
            found, history = trained(client)
        assert found == digest
        assert [r.terms for r in history.steps] == [r.terms for r in straight.steps]
        assert [e.logprobs for e in history.evaluations] == [e.logprobs for e in straight.evaluations]
        happened += network.happened
    assert happened.keys() == set(FAULTS)
