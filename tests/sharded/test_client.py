"""A node of two processes answers as a node of one, and says what went wrong in either."""

import numpy as np
import pytest
import torch
from flwr.common import parameters_to_ndarrays

from ferret_flwr.flower import ShardedClient
from tests.sharded import broken
from tests.sharded.model import Tied, client_of, context_of, federation, make_client

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def request_of_the_first_round(tmp_path):
    client = client_of(Tied(torch.float32), context_of(0, tmp_path / "first"))
    _, _, (node,) = federation([client], rounds=1)
    ins = node.requests[0]
    return parameters_to_ndarrays(ins.parameters), ins.config


def test_it_answers_as_one_process_does(request_of_the_first_round, tmp_path):
    alone = client_of(Tied(torch.float32), context_of(0, tmp_path / "alone"))
    (expected,), examples, metrics = alone.fit(*request_of_the_first_round)
    client = ShardedClient(make_client, context_of(0, tmp_path / "sharded"), processes=2)
    (found,), count, told = client.fit(*request_of_the_first_round)
    assert count == examples
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert told["fingerprint"] == metrics["fingerprint"]
    assert told["train/after"] == pytest.approx(metrics["train/after"], rel=1e-4)
    assert client.get_properties({"ask": "partition-id"}) == {"partition-id": 0}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (broken.raises, "ValueError: the data has gone"),
        pytest.param(
            broken.ends,
            "ProcessExitedException: process 1 terminated with exit code 9",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["an error", "its end"],
)
def test_what_goes_wrong_in_one_process(tmp_path, make, error):
    client = ShardedClient(make, context_of(3, tmp_path), processes=2)
    answer = client.get_properties({})
    assert answer == {"error": error, "stale": False, "partition-id": 3}
