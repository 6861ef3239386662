"""Strategies of the Message API that bear liars, on coefficients."""

import numpy as np
import pytest
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum

from ferret_flwr.config import FerretConfig
from ferret_flwr.flower import Ferret

from .conftest import Nodes, message_app, message_fedavg, run_messages, start_arrays

LIARS = 3
ROUNDS = 4
SAMPLING = {"fraction_evaluate": 0.0, "min_evaluate_nodes": 0}
ROBUST = {
    "FedMedian": (FedMedian, {}, 10),
    "FedTrimmedAvg": (FedTrimmedAvg, {"beta": 0.35}, 10),
    "Krum": (Krum, {"num_malicious_nodes": LIARS}, 10),
    "MultiKrum": (MultiKrum, {"num_malicious_nodes": LIARS, "num_nodes_to_select": 5}, 10),
    "Bulyan": (Bulyan, {"num_malicious_nodes": LIARS}, 4 * LIARS + 3 + LIARS),  # NaN are refused
}
ATTACKS = {
    "flip": lambda step, rng: -10 * step,
    "scale": lambda step, rng: 100 * step,
    "random": lambda step, rng: 20 * rng.standard_normal(step.shape),
    "NaN": lambda step, rng: step * np.nan,
}
# Projections as they are by default, and such that a coefficient's size says nothing by itself.
CONFIGS = {
    "interleaved": FerretConfig(coefficients=1024, max_norm_ratio=0.0),
    "contiguous": FerretConfig(
        coefficients=1024, blocks=8, family="truncated-normal", allocation="uniform",
        max_norm_ratio=0.0,
    ),
}  # fmt: skip


def learner(attack):
    """Return a training that halves every array, but for liars."""

    def train(arrays, partition):
        rng = np.random.default_rng(partition)
        moved = []
        for array in arrays:
            if array.dtype.kind != "f":
                moved.append(array)
                continue
            step = -0.2 * array * (1 + 0.1 * rng.standard_normal(array.shape))
            if partition < LIARS and attack:
                step = ATTACKS[attack](step, rng)
            moved.append(np.asarray(array + step, dtype=array.dtype))
        moved[-1] = moved[0]  # the tied one
        return moved

    return train


def left_after(strategy, attack, nodes, folder, config):
    """Return the share of the first array's energy that is left after some rounds."""
    ferret = Ferret(strategy, config)
    crowd = Nodes(message_app(learner(attack)), folder, nodes)
    crowd.fresh = False
    arrays, _ = run_messages(ferret, crowd, ROUNDS)
    return float(np.square(arrays[0], dtype=np.float64).sum() / np.square(START).sum())


START = next(iter(start_arrays().values())).astype(np.float64)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ROBUST)
def test_liars_are_borne(name, config, tmp_path):
    kind, own, nodes = ROBUST[name]
    for attack in ATTACKS if config == "interleaved" else ["scale"]:
        strategy = kind(min_train_nodes=nodes, min_available_nodes=nodes, **SAMPLING, **own)
        left = left_after(strategy, attack, nodes, tmp_path / attack, CONFIGS[config])
        assert left < 0.75, attack


@pytest.mark.parametrize("attack", ["flip", "scale", "random"])
def test_fedavg_does_not_bear_them(attack, tmp_path):
    honest = left_after(message_fedavg(), None, 10, tmp_path / "a", CONFIGS["interleaved"])
    assert honest < 0.5
    assert left_after(message_fedavg(), attack, 10, tmp_path / "b", CONFIGS["interleaved"]) > 1
