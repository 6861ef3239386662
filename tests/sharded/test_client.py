"""A node of two processes answers as a node of one, and says what went wrong in either."""

import numpy as np
import pytest
import torch
from flwr.common import parameters_to_ndarrays

from ferret_flwr.config import ConfigError
from ferret_flwr.flower import ShardedClient
from tests.sharded import broken
from tests.sharded.model import Tied, client_of, context_of, federation, make_client

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def requests(tmp_path):
    """What a node is sent in the first round: to train, then to evaluate."""
    client = client_of(Tied(torch.float32), context_of(0, tmp_path / "first"))
    _, _, (node,) = federation([client], rounds=1)
    return [(parameters_to_ndarrays(ins.parameters), ins.config) for ins in node.requests]


def clients(folder, make=make_client):
    """Return a client of one process, and one of two."""
    alone = client_of(Tied(torch.float32), context_of(0, folder / "alone"))
    return alone, ShardedClient(make, context_of(0, folder / "sharded"), processes=2)


def test_it_trains_as_one_process_does(requests, tmp_path):
    alone, client = clients(tmp_path)
    (expected,), examples, metrics = alone.fit(*requests[0])
    (found,), count, told = client.fit(*requests[0])
    assert count == examples
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert told["fingerprint"] == metrics["fingerprint"]
    assert told["train/after"] == pytest.approx(metrics["train/after"], rel=1e-4)
    assert client.get_properties({"ask": "partition-id"}) == {"partition-id": 0}


@pytest.mark.slow
def test_it_answers_other_messages_as_one_process_does(requests, tmp_path):
    alone, client = clients(tmp_path)
    assert client.get_properties({}) == alone.get_properties({})
    loss, *rest = alone.evaluate(*requests[1])
    found, *told = client.evaluate(*requests[1])
    assert found == pytest.approx(loss, rel=1e-4)
    assert told == rest
    base, _, _ = alone.evaluate(*requests[0])  # before the round
    assert abs(base - loss) > 1e-3 * loss


@pytest.mark.slow
def test_a_long_answer(tmp_path):
    client = ShardedClient(broken.Long, context_of(3, tmp_path), processes=2)
    (found,), examples, metrics = client.fit([], {"fails": False})
    np.testing.assert_array_equal(found, np.arange(50_000, dtype=np.float32))
    assert (examples, metrics) == (3, {})
    answer = client.fit([], {"fails": True})
    error = {"error": "ValueError: the data has gone", "stale": False, "partition-id": 3}
    assert answer == ([], 0, error)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (broken.raises, "ValueError: the data has gone"),
        pytest.param(
            broken.ends,
            "ProcessExitedException: process 1 terminated with exit code 9",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            broken.leaves, "RuntimeError: 0 of 2 processes answered", marks=pytest.mark.slow
        ),
    ],
    ids=["an error", "its end", "no answer"],
)
def test_what_goes_wrong_in_one_process(tmp_path, make, error):
    client = ShardedClient(make, context_of(3, tmp_path), processes=2)
    answer = client.get_properties({})
    assert answer == {"error": error, "stale": False, "partition-id": 3}


@pytest.mark.slow
def test_an_error_in_training(requests, tmp_path):
    _, client = clients(tmp_path, broken.fails_late)
    arrays, examples, metrics = client.fit(*requests[0])
    assert (arrays, examples) == ([], 0)
    assert metrics["error"] == "ValueError: the data has gone"


def test_what_goes_wrong_before_there_are_processes(tmp_path):
    answer = ShardedClient(lambda context: None, context_of(3, tmp_path), processes=2).evaluate(
        [], {}
    )
    assert answer[:2] == (0.0, 0) and answer[2]["partition-id"] == 3
    assert "<lambda>" in answer[2]["error"]
    with pytest.raises(ConfigError, match="'processes' of a ShardedClient must .* 1, got 0"):
        ShardedClient(make_client, context_of(3, tmp_path), processes=0)
