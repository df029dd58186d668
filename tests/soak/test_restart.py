"""A server that dies under training and comes back: the client waits for it, and goes on."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.soak.chaos_proxy import bad_network
from tests.support import CALL_TIMEOUT_S, ROWS, Server
from zoact_remote import Adam, Adapter, Basis, Client, StepRecord, Trainer, TwoPoint


def trainer(client: Client, name: str) -> tuple[Adapter, Trainer]:
    adapter = client.create_adapter(name, rank=2, basis=Basis(positions="both"))
    adapter.calibrate(ROWS)
    return adapter, Trainer(adapter, TwoPoint(), Adam(), 0.01, ROWS, steps=12, batch_size=2)


def test_training_outlives_its_server(tiny_model: Path, tmp_path: Path) -> None:
    server = Server(tiny_model, "transformers", tmp_path).start()
    restarts: list[threading.Thread] = []
    try:
        with server.client() as client:
            adapter, run = trainer(client, "tests/undisturbed")
            run.run()
            digest = adapter.refresh().digest

        # The proxy stands for the address that stays, and says 502 while nobody is behind it.
        with (
            bad_network(server.url, seed=0, rate=0.0) as network,
            Client(network.url, timeout=CALL_TIMEOUT_S) as client,
        ):
            adapter, run = trainer(client, "tests/disturbed")

            def restart() -> None:
                server.start()
                network.target = server.url

            def interrupt(_: Trainer, record: StepRecord) -> None:
                if record.step in (3, 7):
                    for thread in restarts:
                        thread.join()
                    server.kill()
                    restarts.append(threading.Thread(target=restart))
                    restarts[-1].start()

            run.callbacks = [interrupt]
            assert len(run.run().steps) == 12
            assert adapter.refresh().digest == digest
        assert len(restarts) == 2
    finally:
        for thread in restarts:
            thread.join()
        server.kill()
