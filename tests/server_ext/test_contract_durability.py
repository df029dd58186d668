"""What is acknowledged survives a server that dies without warning, and readers see whole versions."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server_ext.support import layout_of
from tests.support import ROWS, Server, new_adapter
from zoact_remote import Basis, Client, NotFound, StaleVersion, Update, UpdateResult, ZoActError
from zoact_remote.digest import coefficients_digest
from zoact_remote.replay import replay


def test_a_server_killed_in_mid_training_comes_back_with_all_it_acknowledged(server: Server) -> None:
    acknowledged: list[UpdateResult] = []
    enough = threading.Event()
    with server.client() as client:
        adapter = new_adapter(client, basis=Basis(positions="prompt"), rows=ROWS)
        gone = new_adapter(client)
        gone.delete()
        scores = adapter.scores(ROWS, version=0)

        def train() -> None:
            for version in range(100_000):
                try:
                    acknowledged.append(adapter.update(Update(version, ((version, 0.01),), decay=0.001)))
                except ZoActError:
                    return
                if len(acknowledged) == 20:
                    enough.set()

        training = threading.Thread(target=train)
        training.start()
        assert enough.wait(60)
        server.kill()
        training.join(60)
        assert not training.is_alive()
        name, basis = adapter.name, adapter.info.basis_digest

    server.start()
    with server.client() as client:
        adapter = client.adapter(name)
        entries = list(adapter.journal())
        assert [entry.digest for entry in entries[: len(acknowledged)]] == [result.digest for result in acknowledged]
        # The server may have written one update more than it could tell us of.
        assert len(acknowledged) <= adapter.info.version == len(entries) <= len(acknowledged) + 1
        layout = layout_of(client, adapter)
        flat = replay(layout, "rademacher", [entry.update for entry in entries])
        assert adapter.info.digest == entries[-1].digest == coefficients_digest(flat, layout)
        assert adapter.info.basis_digest == basis
        with pytest.raises(NotFound):
            client.adapter(gone.name)

        # It goes on where it was.
        result = adapter.update(Update(adapter.info.version, ((1, 0.5),)))
        assert result.version == len(entries) + 1
        again = adapter.scores(ROWS, version=0)
        assert [r.loss for r in again.rows] == pytest.approx([r.loss for r in scores.rows], abs=1e-5)
        assert adapter.scores(ROWS).loss != pytest.approx(scores.loss, abs=1e-3)


def test_of_updates_that_race_one_wins(client: Client) -> None:
    adapter = new_adapter(client)
    racers = 6

    def race(number: int) -> UpdateResult | StaleVersion:
        try:
            return adapter.update(Update(0, ((number, 0.1),)))
        except StaleVersion as stale:
            return stale

    with ThreadPoolExecutor(racers) as pool:
        outcomes = list(pool.map(race, range(racers), timeout=60))
    (winner,) = (outcome for outcome in outcomes if isinstance(outcome, UpdateResult))
    assert [o.current_version for o in outcomes if isinstance(o, StaleVersion)] == [1] * (racers - 1)
    assert adapter.refresh().version == 1
    assert adapter.info.digest == winner.digest


def test_readers_see_whole_versions(client: Client) -> None:
    """A loss asked for while updates come in is that of the version that the answer names."""
    adapter = new_adapter(client)
    versions = 6
    done = threading.Event()
    seen: list[tuple[int, float]] = []

    def read() -> None:
        while not done.is_set():
            scores = adapter.scores(ROWS[:2])
            seen.append((scores.version, scores.loss))

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for version in range(versions):
                adapter.losses(ROWS[:1], [], base=True, update=Update(version, ((version, 0.2),)))
        finally:
            done.set()
        for reader in readers:
            reader.result(60)
    expected = [adapter.scores(ROWS[:2], version=version).loss for version in range(versions + 1)]
    assert len({round(loss, 4) for loss in expected}) == versions + 1
    assert {version for version, _ in seen} & set(range(1, versions + 1))
    for version, loss in seen:
        assert loss == pytest.approx(expected[version], abs=1e-4)


def test_an_adapter_deleted_under_its_readers_is_gone_for_all(client: Client) -> None:
    adapter = new_adapter(client)

    def use(number: int) -> str:
        try:
            if number == 3:
                adapter.delete()
            else:
                adapter.scores(ROWS)
        except NotFound:
            return "not found"
        return "done"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(use, range(8), timeout=60))
    assert outcomes[3] == "done"
    with pytest.raises(NotFound):
        adapter.scores(ROWS)
