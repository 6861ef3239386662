"""Two processes that share a model by FSDP find what one process finds."""

import numpy as np
import pytest
import torch

from ferret_flwr.projection.layout import Layout
from ferret_flwr.training.sharded import _counts
from ferret_flwr.training.tensors import trainable_parameters
from tests.sharded import work
from tests.sharded.model import Tied

PROCESSES = 2


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What each process has found."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work.in_process, (PROCESSES, str(folder)), nprocs=PROCESSES)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(PROCESSES)]


@pytest.fixture(scope="module", params=work.DTYPES)
def both(request, sharded, one_thread_a_module):
    """What each of the processes, and what one alone, finds with a dtype."""
    model = Tied(getattr(torch, request.param))
    layout = Layout.of(trainable_parameters(model))
    prefix = f"{request.param}/"
    theirs = [
        {k.removeprefix(prefix): v for k, v in one.items() if k.startswith(prefix)}
        for one in sharded
    ]
    return layout, theirs, work.found(model, layout)


NAMES = [f"{kind}-{exact}" for kind in work.KINDS for exact in (0, work.EXACT)]


def test_each_has_its_rows(both):
    layout, theirs, _ = both
    assert all(one["layout"] == layout.fingerprint for one in theirs)
    sizes = [[one[f"w/{i}"].size for one in theirs] for i in range(len(layout.names))]
    assert sizes[layout.names.index("embed.weight")] == [12 * 10, 11 * 10]
    assert sizes[layout.names.index("shift")] == [10, 0]
    assert "head.weight" not in layout.names and "fixed.weight" not in layout.names
    assert theirs[0]["first"].tolist() == [0] * len(layout.names)
    assert theirs[1]["first"].tolist() == [first for first, _ in sizes]


@pytest.mark.parametrize("name", NAMES)
def test_reconstructions_and_fingerprints_have_the_same_bits(both, name):
    layout, theirs, alone = both
    for one in theirs:
        assert one[f"{name}/base"] == alone[f"{name}/base"]
        assert one[f"{name}/fingerprint"] == alone[f"{name}/fingerprint"]
    assert alone[f"{name}/base"] != alone[f"{name}/fingerprint"]
    for i in range(len(layout.names)):
        parts = np.concatenate([one[f"{name}/m/{i}"] for one in theirs])
        assert parts.tobytes() == alone[f"{name}/m/{i}"].tobytes()
    for i in range(len(layout.names)):
        parts = np.concatenate([one[f"w/{i}"] for one in theirs])
        assert parts.dtype == alone[f"w/{i}"].dtype
        assert parts.tobytes() == alone[f"w/{i}"].tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_projections_differ_by_roundings(both, name):
    _, theirs, alone = both
    expected = alone[f"{name}/gamma"]
    assert theirs[0][f"{name}/gamma"].tobytes() == theirs[1][f"{name}/gamma"].tobytes()
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(theirs[0][f"{name}/gamma"], expected, rtol=0, atol=atol)
    assert not np.allclose(theirs[0][f"{name}/gamma"], 1.001 * expected, rtol=0, atol=atol)


def test_a_local_round_under_fsdp(both):
    _, theirs, alone = both
    coarse = alone["w/0"].dtype == np.uint16  # gradients in bfloat16 are added in another order
    tolerance = 0.05 if coarse else 1e-4
    for one in theirs:
        assert one["round/loss"] == pytest.approx(alone["round/loss"], rel=tolerance)
        assert one["round/fidelity"] == pytest.approx(alone["round/fidelity"], rel=tolerance)
        distance = np.linalg.norm(one["round/gamma"] - alone["round/gamma"])
        assert distance < tolerance * np.linalg.norm(alone["round/gamma"])
    assert 0 < alone["round/fidelity"] < 1


def test_replicas_count_once(sharded, one_thread):
    model = Tied(torch.float32)
    layout = Layout.of(trainable_parameters(model))
    alone = work.found(model, layout)
    for one in sharded:
        for name in NAMES:
            assert one[f"replicas/{name}/fingerprint"] == alone[f"{name}/fingerprint"]
            found, expected = one[f"replicas/{name}/gamma"], alone[f"{name}/gamma"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        for i in range(len(layout.names)):
            assert one[f"replicas/w/{i}"].tobytes() == alone[f"w/{i}"].tobytes()


@pytest.mark.parametrize("sharded_over", [None, 0, 1])
def test_each_part_counts_in_one_process_of_a_grid(sharded_over):
    counted = [
        None if sharded_over is None else rank[sharded_over]  # which part it holds
        for rank in np.ndindex(2, 3)
        if _counts(rank, sharded_over)
    ]
    assert counted == {None: [None], 0: [0, 1], 1: [0, 1, 2]}[sharded_over]


@pytest.mark.slow
def test_two_replicas_of_two_shards(tmp_path, one_thread):
    torch.multiprocessing.spawn(work.in_grid, (4, str(tmp_path)), nprocs=4)
    model = Tied(torch.float32)
    layout = Layout.of(trainable_parameters(model))
    alone = work.found(model, layout)
    grid = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(4)]
    for one in grid:
        for name in NAMES:
            assert one[f"{name}/fingerprint"] == alone[f"{name}/fingerprint"]
            found, expected = one[f"{name}/gamma"], alone[f"{name}/gamma"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert one["round/fidelity"] == pytest.approx(alone["round/fidelity"], rel=1e-4)
    embed = layout.names.index("embed.weight")
    assert [one[f"w/{embed}"].size for one in grid] == [12 * 10, 11 * 10] * 2


def test_models_sharded_in_other_ways_are_refused(sharded):
    for one in sharded:
        assert "parameter 'weight' is placed as (Shard(dim=1),): a" in str(one["refused/columns"])
        assert "shard it with torch.distributed.fsdp.fully_shard" in str(one["refused/older"])


def test_a_run_with_a_sharded_node_and_another(sharded, tmp_path):
    alone = work.run_federation(Tied(torch.float32), tmp_path)
    for one in sharded:
        assert one["run/fingerprint"] == sharded[0]["run/fingerprint"]
        assert one["run/c"].tobytes() == sharded[0]["run/c"].tobytes()
        np.testing.assert_allclose(one["run/losses"], alone["run/losses"], rtol=1e-4)
    assert np.ptp(alone["run/losses"]) > 1e-3 * alone["run/losses"][0]
