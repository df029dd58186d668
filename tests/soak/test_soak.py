"""The soak runs in short; as modules they go on for as long as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.fuzz import OPERATOR, Fuzz
from tests.soak.server_kills import DAMAGE, soak
from tests.support import Server


@pytest.mark.parametrize("damages", [(), DAMAGE])
def test_a_server_that_is_killed_again_and_again(tiny_model: Path, tmp_path: Path, damages: tuple[str, ...]) -> None:
    tally = soak(tmp_path, tiny_model, 6, damages)
    assert tally.kills.total() == 6
    assert tally.acknowledged > 0
    assert (tally.lost, tally.doubled, tally.differing) == (0, 0, [])


def test_no_call_fails_the_server(tiny_model: Path, tmp_path: Path) -> None:
    server = Server(tiny_model, "transformers", tmp_path, OPERATOR)
    try:
        fuzz = Fuzz(server.start().url)
        fuzz.run(300)
    finally:
        server.kill()
    assert fuzz.answers.total() == 300
    assert fuzz.findings == []
