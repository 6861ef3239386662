"""Two lines make Ferret of an ordinary FedAvg project, whatever arrays it has."""

import flwr.server.strategy
import flwr.serverapp.strategy
import numpy as np
import pytest
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

from ferret_flwr.config import ConfigError, FerretConfig
from ferret_flwr.flower import Ferret, ferret_mod
from ferret_flwr.ledger import Ledger
from ferret_flwr.projection.encoding import encoded_nbytes

from .conftest import Nodes, legacy_fedavg, numpy_app, run_legacy, start_arrays, train

START = start_arrays()
TUNED = ["embed", "half", "frozen", "head"]
EXACT = ["norm", "scalar"]
SIZE = sum(START[name].size for name in TUNED)
VECTORS = sum(START[name].size for name in EXACT)


def run_fedavg(api, folder, rounds=3):
    app, strategy, run = api
    return run(strategy(), Nodes(app(mods=[]), folder), rounds)[0]


def run_ferret(api, folder, rounds=3, coefficients=10**6, **more):
    app, strategy, run = api
    nodes = Nodes(app(), folder)
    ferret = Ferret(strategy(), FerretConfig(coefficients=coefficients), **more)
    arrays, _ = run(ferret, nodes, rounds)
    return arrays, ferret, nodes


def test_with_as_many_coefficients_as_parameters_it_is_fedavg(api, tmp_path):
    """Each basis is one element then; what is left is rounding to float32, a round at a time."""
    expected = dict(zip(START, run_fedavg(api, tmp_path / "a"), strict=True))
    arrays, ferret, _ = run_ferret(api, tmp_path / "b")
    assert ferret.ledger.entries[0].plan.num_bases == SIZE
    for (name, start), array in zip(START.items(), arrays, strict=True):
        assert array.dtype == start.dtype and array.shape == start.shape
        if start.dtype.kind != "f":
            np.testing.assert_array_equal(array, start)  # FedAvg's counter is 10 by now
            continue
        unit = np.finfo(np.float16 if name == "half" else np.float32).eps
        largest = np.abs(start).max() + 1
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=6 * unit * largest)
    moved = np.abs(arrays[0] - START["embed"]).max()
    assert moved > 0.1  # else the tolerance would hold for a run that does nothing


def test_a_round_is_kilobytes_and_vectors_are_exact(api, tmp_path):
    expected = dict(zip(START, run_fedavg(api, tmp_path / "a", 1), strict=True))
    arrays, _, nodes = run_ferret(api, tmp_path / "b", rounds=1, coefficients=64)
    arrays = dict(zip(START, arrays, strict=True))
    for name in EXACT:
        np.testing.assert_allclose(arrays[name], expected[name], rtol=1e-6)
    assert not np.allclose(arrays["embed"], expected["embed"], atol=1e-3)  # 64 for 2,540 numbers
    trained = [up for kind, _, up in nodes.bytes if kind == "train"]
    assert 4 * (64 + VECTORS) < max(trained) < 4 * (64 + VECTORS) + 1000


def test_bytes_are_counted_as_they_cross(api, tmp_path):
    _, ferret, nodes = run_ferret(api, tmp_path, rounds=2, coefficients=64)
    first, second = ferret.coordinator.rows
    down, up = zip(*[sizes for kind, *sizes in nodes.bytes if kind == "train"], strict=True)
    assert first["comm/downlink_bytes_per_node"] == pytest.approx(down[0] + down[2], rel=0.01)
    assert second["comm/downlink_bytes_per_node"] == pytest.approx(max(down[4:]), abs=100)
    assert second["comm/uplink_bytes_per_node"] == pytest.approx(max(up[4:]), abs=200)


def test_what_no_node_changes_gets_no_noise(api, tmp_path):
    arrays, ferret, _ = run_ferret(api, tmp_path, coefficients=64)
    arrays = dict(zip(START, arrays, strict=True))
    layout = ferret.coordinator.base.layout
    assert layout.names[-2:] == (("1", "7") if "0" in layout.names else ("norm", "scalar"))
    np.testing.assert_array_equal(arrays["tied"], arrays["embed"])
    np.testing.assert_array_equal(arrays["frozen"], START["frozen"])
    assert ferret.ledger.entries[0].still == (2,)
    assert (arrays["embed"] != START["embed"]).any()


def test_the_base_is_sent_once(api, tmp_path):
    _, _, nodes = run_ferret(api, tmp_path, rounds=3, coefficients=64)
    down = [down for kind, down, _ in nodes.bytes if kind == "train"]
    whole = sum(array.nbytes for array in START.values())
    assert len(down) == 2 + 2 + 2 + 2  # both ask for it, then both train, then two more rounds
    assert sorted(n > whole for n in down) == [False] * 6 + [True] * 2
    assert len(list(tmp_path.glob("node-*/bases/*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["deleted", "truncated", "another"])
def test_a_lost_base_is_asked_for_again(damage, api, tmp_path):
    app, strategy, run = api
    expected, _, _ = run_ferret(api, tmp_path / "whole", rounds=2, coefficients=64)
    nodes = Nodes(app(), tmp_path / "lossy")
    ferret = Ferret(strategy(), FerretConfig(coefficients=64))
    run(ferret, nodes, 1)
    (path,) = nodes.cache(1).glob("bases/*.safetensors")
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        other = ferret.coordinator.base.arrays
        type(ferret.coordinator.base)(
            ferret.coordinator.base.names, tuple(array * 2 for array in other)
        ).save(path)
    arrays, _ = run(ferret, nodes, 1)
    assert not ferret.refused
    for array, whole in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, whole)


def test_a_run_is_resumed_bit_for_bit(api, tmp_path):
    expected, _, _ = run_ferret(api, tmp_path / "whole", rounds=3, coefficients=64)
    path = tmp_path / "run.ledger"
    run_ferret(api, tmp_path / "half", rounds=2, coefficients=64, ledger_path=path)
    arrays, ferret, _ = run_ferret(
        api, tmp_path / "other", rounds=1, coefficients=64, ledger=Ledger.load(path)
    )
    assert len(ferret.ledger) == 3
    for array, whole in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, whole)


def test_a_node_that_fails_is_left_out(api, tmp_path, caplog):
    app, strategy, run = api
    nodes = Nodes(app(), tmp_path)
    nodes.dead.add(2)
    more = {"accept_failures": True} if strategy.__name__ == "legacy_fedavg" else {}
    ferret = Ferret(strategy(**more), FerretConfig(coefficients=64))
    run(ferret, nodes, 1)
    assert len(ferret.ledger) == 1
    assert "it is dead" in caplog.text


@pytest.mark.parametrize("mods", [[], [ferret_mod]])
def test_a_forgotten_mod_is_asked_for(api, mods, tmp_path, caplog):
    app, strategy, run = api

    def broken(arrays, partition):
        raise ValueError("these are no weights")

    ferret = Ferret(strategy(), FerretConfig(coefficients=64))
    nodes = Nodes(app(broken, mods=mods), tmp_path)
    nodes.apps_may_fail = True
    run(ferret, nodes, 1)
    assert not ferret.ledger
    assert ("is mods=[ferret_mod] missing?" in caplog.text) == (not mods)


def test_an_app_of_another_strategy_passes_through(api, tmp_path):
    """The mod may stay when the strategy goes."""
    app, strategy, run = api
    with_mod = run(strategy(), Nodes(app(), tmp_path / "a"), 1)[0]
    for array, plain in zip(with_mod, run_fedavg(api, tmp_path / "b", 1), strict=True):
        np.testing.assert_array_equal(array, plain)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda arrays: arrays[:-1], "lacks array"),
        (lambda arrays: [*arrays[:-1], arrays[-1][None]], "of shape (1, 40, 30), it got (40, 30)"),
        (lambda arrays: [*arrays[:3], arrays[3] * np.nan, *arrays[4:]], "not finite in tensor"),
    ],
)
def test_what_an_app_returns_is_checked(spoil, reason, api, tmp_path):
    app, strategy, run = api

    def spoilt(arrays, partition):
        return spoil(arrays) if partition else arrays

    if app.__name__ == "message_app" and reason == "lacks array":
        pytest.skip("this app returns what it has names for")
    ferret = Ferret(strategy(fraction_evaluate=0.0), FerretConfig(coefficients=64))
    run(ferret, Nodes(app(spoilt), tmp_path), 1)
    (said,) = ferret.refused.values()
    assert reason in said
    assert len(ferret.ledger) == 1


def test_nodes_tell_what_they_start_from(tmp_path):
    """A legacy strategy without initial parameters asks a node for them, as Flower does."""
    nodes = Nodes(numpy_app(), tmp_path / "a")
    told = Ferret(legacy_fedavg(start=False), FerretConfig(coefficients=64))
    given = Ferret(legacy_fedavg(), FerretConfig(coefficients=64))
    arrays, _ = run_legacy(told, nodes, 2)
    expected, _ = run_legacy(given, Nodes(numpy_app(), tmp_path / "b"), 2)
    for array, other in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, other)


def test_evaluation_gets_whole_arrays_on_both_sides(api, tmp_path):
    app, strategy, run = api
    seen = []
    if strategy.__name__ == "legacy_fedavg":
        inner = strategy(evaluate_fn=lambda round, arrays, config: seen.append(arrays))
        arrays, history = run(
            Ferret(inner, FerretConfig(coefficients=64)), Nodes(app(), tmp_path), 2
        )
        losses = [loss for _, loss in history.losses_distributed]
    else:
        arrays, result = run(
            Ferret(strategy(), FerretConfig(coefficients=64)),
            Nodes(app(), tmp_path),
            2,
            evaluate_fn=lambda round, arrays: seen.append([a.numpy() for a in arrays.values()]),
        )
        losses = [m["loss"] for m in result.evaluate_metrics_clientapp.values()]
    assert len(seen) == 3 and len(losses) == 2
    for array, last in zip(arrays, seen[-1], strict=True):
        np.testing.assert_array_equal(array, last)
    np.testing.assert_array_equal(seen[0][0], START["embed"])
    assert losses[-1] == pytest.approx(float(np.square(arrays[0]).mean()), rel=1e-6)


def test_own_bases_per_client(api, tmp_path):
    app, strategy, run = api
    config = FerretConfig(coefficients=64, bases="per-client")
    ferret = Ferret(strategy(), config)
    run(ferret, Nodes(app(), tmp_path), 2)
    assert not ferret.refused
    assert ferret.ledger.entries[-1].coefficients.shape == (2, 64 + VECTORS)


def test_without_exact_vectors_everything_is_projected(api, tmp_path):
    _, ferret, _ = run_ferret(api, tmp_path, coefficients=64, exact_vectors=False)
    assert ferret.ledger.entries[0].plan.exact == 0
    assert ferret.ledger.header.size == SIZE + VECTORS


def test_equal_matrices_that_part_are_named(api, tmp_path):
    app, strategy, run = api

    def part(arrays, partition):
        return [*train(arrays, partition)[:-1], arrays[-1]]

    ferret = Ferret(strategy(fraction_evaluate=0.0), FerretConfig(coefficients=64))
    run(ferret, Nodes(app(part), tmp_path / "a"), 1)
    assert all("were equal at the start and are not" in r for r in ferret.refused.values())
    assert len(ferret.refused) == 2
    free = Ferret(strategy(fraction_evaluate=0.0), FerretConfig(coefficients=64), tie_equal=False)
    arrays, _ = run(free, Nodes(app(part), tmp_path / "b"), 1)
    assert not free.refused
    assert (arrays[0] != arrays[-1]).any()


KEEPS_WEIGHTS = {
    "legacy": ["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "QFedAvg"],
    "message": ["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "QFedAvg", "FedXgbBagging"],
}


@pytest.mark.parametrize("kind", KEEPS_WEIGHTS)
def test_strategies_of_weights_are_refused_by_name(kind):
    module = {"legacy": flwr.server.strategy, "message": flwr.serverapp.strategy}[kind]
    for name in KEEPS_WEIGHTS[kind]:
        strategy = getattr(module, name)
        with pytest.raises(ConfigError, match=f"{name} cannot stand inside Ferret: it "):
            Ferret(strategy.__new__(strategy))


def test_what_is_changed_around_ferret_is_refused(tmp_path):
    """It would reach no node; in the Message API nothing but Ferret's own start starts a run."""
    ferret = Ferret(legacy_fedavg(), FerretConfig(coefficients=64))
    whole = ferret.aggregate_fit

    def noisy(*arguments, **named):
        arrays, metrics = whole(*arguments, **named)
        return ndarrays_to_parameters([a + 1 for a in parameters_to_ndarrays(arrays)]), metrics

    ferret.aggregate_fit = noisy
    with pytest.raises(ConfigError, match="Ferret must be the outermost"):
        run_legacy(ferret, Nodes(numpy_app(), tmp_path), 2)


@pytest.mark.parametrize("numbers", ["float16", "int8"])
def test_fewer_bytes_a_coefficient(numbers, api, tmp_path):
    app, strategy, run = api
    runs = {}
    for kind in ("float32", numbers):
        nodes = Nodes(app(), tmp_path / kind)
        path = tmp_path / f"{kind}.ledger"
        config = FerretConfig(coefficients=2048, number_format=kind)
        ferret = Ferret(strategy(fraction_evaluate=0.0), config, ledger_path=path)
        arrays, _ = run(ferret, nodes, 2)
        assert not ferret.refused
        kept = Ledger.load(path).entries[-1]
        np.testing.assert_array_equal(kept.coefficients, ferret.ledger.entries[-1].coefficients)
        runs[kind] = arrays[0], nodes.bytes[-1], ferret.ledger
    (exact, (_, *whole), ledger), (rounded, (_, *few), other) = runs["float32"], runs[numbers]
    entry = other.entries[0]
    assert entry.nbytes == encoded_nbytes(2048, numbers, VECTORS) == entry.encoded.size
    for many, fewer in zip(whole, few, strict=True):  # down and up: but for words, what is saved
        saved = ledger.entries[0].nbytes - entry.nbytes
        assert many - fewer == pytest.approx(saved, abs=200)
    scale = np.abs(ledger.entries[0].coefficients).max()
    error = np.abs(entry.coefficients - ledger.entries[0].coefficients).max()
    assert 0 < error < scale * {"float16": 2 * 2**-11, "int8": 2 / 127}[numbers]
    np.testing.assert_array_equal(
        entry.coefficients[0, 2048:], ledger.entries[0].coefficients[0, 2048:]
    )
    assert np.abs(rounded - exact).max() < 0.1 * np.abs(exact - START["embed"]).max()
