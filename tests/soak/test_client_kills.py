"""A few of the kills that ``python -m tests.soak.client_kills`` makes many of."""

from pathlib import Path

from tests.soak.client_kills import killed, undisturbed
from tests.support import Servers


def test_a_killed_client_ends_where_an_undisturbed_one_does(servers: Servers, tmp_path: Path) -> None:
    url = servers("transformers").url
    places, _ = killed(url, tmp_path, undisturbed(url, tmp_path), kills=5, seed=1)
    assert places.total() == 5
