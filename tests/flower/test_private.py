"""Differential privacy by Flower's wrappers and mods: the noise is where the guarantee needs it.

Flower draws its noise from NumPy's global generator, which nobody seeds: what a test says of noise
holds but once in a million runs or less.
"""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.client.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.common import FitIns, FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat
from flwr.server import SimpleClientManager
from flwr.server.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedMedian,
    Strategy,
)

from client_app import app
from ferret_flwr.config import ConfigError, parse
from ferret_flwr.flower import Ferret
from ferret_flwr.flower.mods import PROTOCOL, on_coefficients
from ferret_flwr.flower.private import AdaptiveClipping, price
from tests.flower.conftest import OK, SETTINGS, Federation, InProcess
from tests.flower.small import SmallFederation, be_a_node

NODES, CLIP, NOISE = 4, 0.5, 2.0  # the honest updates of round 1 are longer than CLIP
TINY = 1e-9  # a noise multiplier whose noise does not show


def fixed(noise: float = NOISE, nodes: int = NODES) -> Strategy:
    return DifferentialPrivacyServerSideFixedClipping(
        FedAvg(fraction_evaluate=0.0), noise, CLIP, nodes
    )


def on_nodes(noise: float = NOISE) -> Strategy:
    return DifferentialPrivacyClientSideFixedClipping(
        FedAvg(fraction_evaluate=0.0), noise, CLIP, NODES
    )


class Keeps(FedAvg):
    """Keeps what it is given."""

    def aggregate_fit(self, server_round, results, failures):  # type: ignore[no-untyped-def]
        self.rows = [parameters_to_ndarrays(r.parameters)[0].copy() for _, r in results]
        return super().aggregate_fit(server_round, results, failures)


def published(server: Ferret) -> np.ndarray:
    """Return γ as the first entry of the ledger holds it."""
    entry = server.ledger.entries[0]
    return entry.coefficients[0].astype(np.float64) / entry.rate


def clipped(rows: list[np.ndarray]) -> np.ndarray:
    """Return the rows as they should be clipped: float64, ``(nodes, K)``."""
    norms = np.linalg.norm(np.stack(rows).astype(np.float64), axis=1)
    assert norms.min() > CLIP  # else nothing is tested
    return np.stack(rows) * (CLIP / norms)[:, None]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Return what the nodes send in round 1."""
    federation = SmallFederation(tmp_path_factory.mktemp("honest"), NODES)
    keeps = Keeps(fraction_evaluate=0.0)
    federation.run(federation.ferret(keeps), 1)
    return keeps.rows


def check_noise(noise: np.ndarray, std: float) -> None:
    """Hold samples against N(0, std²): mean and deviation within five standard errors."""
    assert abs(noise.mean()) < 5 * std / math.sqrt(noise.size)
    assert abs(noise.std() / std - 1) < 5 / math.sqrt(2 * noise.size)


def noise_of(make, honest: list[np.ndarray], folder: Path, mods=()) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Return the noise in the published coefficients of several runs."""
    found = []
    for run in range(8):
        federation = SmallFederation(folder / str(run), NODES)
        if mods:
            federation.through_app(*mods)
        server = federation.ferret(make())
        federation.run(server, 1)
        found.append(published(server) - clipped(honest).mean(axis=0))
    return np.concatenate(found)


def test_the_noise_is_in_the_published_coefficients(
    honest: list[np.ndarray], tmp_path: Path
) -> None:
    noise = noise_of(fixed, honest, tmp_path)
    check_noise(noise, NOISE * CLIP / NODES)
    with pytest.raises(AssertionError):  # eight runs are enough to tell a fifth less
        check_noise(noise, 1.25 * NOISE * CLIP / NODES)


def test_noise_of_adaptive_clipping(honest: list[np.ndarray], tmp_path: Path) -> None:
    """All four are clipped, none should be: the norm grows, and with it Flower's noise."""

    def adaptive() -> Strategy:
        return AdaptiveClipping(
            FedAvg(fraction_evaluate=0.0), NOISE, NODES, CLIP, 0.0, 0.2, clipped_count_stddev=50.0
        )

    z = adaptive().noise_multiplier
    # The count's noise is far larger than the count: the next norm is anything from less to more.
    noise = noise_of(adaptive, honest, tmp_path)
    assert noise.std() > z * CLIP / NODES * (1 - 5 / math.sqrt(2 * noise.size))


def test_client_side_clipping_with_flowers_mod(honest: list[np.ndarray], tmp_path: Path) -> None:
    noise = noise_of(on_nodes, honest, tmp_path, [on_coefficients(fixedclipping_mod)])
    check_noise(noise, NOISE * CLIP / NODES)


def test_a_node_that_does_not_clip_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation = SmallFederation(tmp_path, NODES)
    with caplog.at_level(logging.WARNING):
        server = federation.ferret(on_nodes())
        federation.run(server, 1)
    assert len(server.ledger) == 0
    assert "should have been clipped to 0.5" in server.refused["node 2 (partition 2)"]
    assert "on_coefficients(fixedclipping_mod)" in caplog.text


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(CLIP, CLIP, 1.0, 1e-5)])
def test_flowers_mods_alone_do_not_pass_unnoticed(mod, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """They would subtract packed rounds from coefficients; the shapes tell."""
    federation = SmallFederation(tmp_path, NODES)
    federation.through_app(mod)
    server = federation.ferret(on_nodes(TINY))
    federation.run(server, 1)
    assert len(server.ledger) == 0


def test_a_mod_leaves_an_answer_without_coefficients_as_it_is(tmp_path: Path) -> None:
    federation = SmallFederation(tmp_path, NODES)
    federation.through_app(on_coefficients(fixedclipping_mod))
    reply = federation.proxies[0].fit(FitIns(ndarrays_to_parameters([]), {}), None, None)
    assert "no 'ferret' entry" in str(reply.metrics["error"])


def test_local_noise_of_flowers_mod(honest: list[np.ndarray], tmp_path: Path) -> None:
    epsilon, delta = 1.0, 1e-5
    mod = on_coefficients(LocalDpMod(CLIP, 2 * CLIP, epsilon, delta))
    kept = []
    for run in range(4):
        federation = SmallFederation(tmp_path / str(run), NODES)
        federation.through_app(mod)
        keeps = Keeps(fraction_evaluate=0.0)
        federation.run(federation.ferret(keeps), 1)
        kept.append(np.stack(keeps.rows) - clipped(honest))
    check_noise(np.concatenate(kept), 2 * CLIP * math.sqrt(2 * math.log(1.25 / delta)) / epsilon)


@pytest.mark.parametrize("examples", [1, 10**6])
def test_no_node_weighs_more_than_another(
    examples: int, honest: list[np.ndarray], tmp_path: Path
) -> None:
    class Claims(InProcess):
        def fit(self, ins, timeout, group_id):  # type: ignore[no-untyped-def]
            reply = super().fit(ins, timeout, group_id)
            reply.num_examples = examples
            return reply

    federation = SmallFederation(tmp_path, NODES)
    federation.proxies[0] = Claims(0, federation.client)
    server = federation.ferret(fixed(TINY))
    federation.run(server, 1)
    np.testing.assert_allclose(published(server), clipped(honest).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("how", ["fails", "NaN", "long"])
def test_who_is_left_out_counts_as_zeros(
    how: str, honest: list[np.ndarray], tmp_path: Path
) -> None:
    """One node changes one term of the mean: neither the denominator nor who else counts."""

    class Bad(InProcess):
        def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
            if how == "fails":
                raise RuntimeError("no power")
            reply = super().fit(ins, timeout, group_id)
            (projected,) = parameters_to_ndarrays(reply.parameters)
            projected = projected * np.float32(np.nan if how == "NaN" else 1e6)
            reply.parameters = ndarrays_to_parameters([projected])
            return reply

    federation = SmallFederation(tmp_path, NODES)
    federation.proxies[0] = Bad(0, federation.client)
    server = federation.ferret(fixed(TINY, nodes=17))  # Ferret tells it how many were asked
    federation.run(server, 1)
    rows = clipped(honest)
    expected = rows.mean(axis=0) if how == "long" else rows[1:].sum(axis=0) / NODES
    np.testing.assert_allclose(published(server), expected, atol=1e-6)


def test_updates_of_zeros_are_clipped(tmp_path: Path) -> None:
    """Flower divides by the norm."""
    federation = SmallFederation(tmp_path, NODES, NODES, lambda honest, _: 0 * honest)
    server = federation.ferret(fixed(TINY))
    federation.run(server, 1)
    assert len(server.ledger) == 1
    assert np.abs(published(server)).max() < 1e-6


def test_contiguous_blocks_are_clipped_by_the_updates_length(tmp_path: Path) -> None:
    federation = SmallFederation(tmp_path, NODES)
    server = federation.ferret(fixed(TINY), blocks=2, allocation="uniform")
    federation.run(server, 1)
    scale = server.ledger.entries[0].plan.unbiased_scale()
    assert scale.max() < 0.1  # so γ alone is many times as long
    entry = server.ledger.entries[0]
    projected = entry.coefficients[0] / (entry.rate * scale)
    assert 0.2 * CLIP < np.linalg.norm(projected * np.sqrt(scale)) < CLIP * (1 + 1e-5)


@pytest.mark.parametrize(
    "around",
    [
        DifferentialPrivacyServerSideFixedClipping,
        DifferentialPrivacyServerSideAdaptiveClipping,
        DifferentialPrivacyClientSideFixedClipping,
        DifferentialPrivacyClientSideAdaptiveClipping,
    ],
)
def test_noise_around_ferret_would_be_lost_and_is_refused(around, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    federation = SmallFederation(tmp_path, NODES)
    mod = fixedclipping_mod if "Fixed" in around.__name__ else adaptiveclipping_mod
    federation.through_app(
        on_coefficients(mod) if "Client" in around.__name__ else lambda m, c, n: n(m, c)
    )
    server = federation.ferret(FedAvg(fraction_evaluate=0.0))
    limits = {"clipping_norm": CLIP} if "Fixed" in around.__name__ else {}
    wrong = around(server, noise_multiplier=0.1, num_sampled_clients=NODES, **limits)
    with pytest.raises((ConfigError, TypeError), match="Ferret must be the outermost"):
        federation.run(wrong, 1)
    assert len(server.ledger) == 0


MEAN = {"fraction_evaluate": 0.0}


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (
            lambda: DifferentialPrivacyServerSideFixedClipping(FedMedian(**MEAN), 1.0, 1.0, 2),
            "around FedMedian: its noise is for a plain mean",
        ),
        (lambda: DifferentialPrivacyServerSideFixedClipping(fixed(), 1.0, 1.0, 2), "one is enough"),
        (
            lambda: DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(**MEAN), 0.1, 2),
            "AdaptiveClipping",
        ),
        (
            lambda: DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(**MEAN), 0.1, 2),
            "norm runs away from the quantile",
        ),
    ],
)
def test_what_has_no_guarantee_is_refused(inside, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        SmallFederation(tmp_path, 2).ferret(inside())


@pytest.mark.parametrize("settings", [{"blocks": 4}, {"family": "truncated-normal"}])
def test_clipping_on_nodes_needs_coefficients_as_long_as_updates(
    settings: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="clips what a node sends by its length"):
        SmallFederation(tmp_path, 2).ferret(on_nodes(), **settings)


def norms_after(strategy, rounds: int) -> list[float]:  # type: ignore[no-untyped-def]
    """Return the clipping norm round by round for 100 nodes of lengths 1 to 100."""
    found = []
    zeros = ndarrays_to_parameters([np.zeros(8, dtype=np.float32)])
    strategy.current_round_params = parameters_to_ndarrays(zeros)
    for _ in range(rounds):
        results = []
        for length in range(1, 101):
            row = np.zeros(8, dtype=np.float32)
            row[0] = length
            results.append((None, FitRes(OK, ndarrays_to_parameters([row]), 1, {})))
        strategy.aggregate_fit(1, results, [])
        found.append(strategy.clipping_norm)
    return found


@pytest.mark.parametrize("start", [5.0, 500.0])
def test_the_norm_follows_the_quantile(start: float) -> None:
    """A fifth should be clipped: the norm goes to 80."""
    arguments = (FedAvg(), 1.0, 100, start, 0.2, 0.5, 1.0)
    assert 70 < norms_after(AdaptiveClipping(*arguments), 40)[-1] < 90  # type: ignore[arg-type]


def test_flowers_own_runs_away() -> None:
    """When this goes red Flower has mended it, and `AdaptiveClipping` must follow."""
    low, high = (
        norms_after(
            DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 1.0, 100, start, 0.2, 0.5, 1.0),
            20,
        )[-1]
        for start in (60.0, 95.0)
    )
    assert low < 20
    assert high > 200


def test_a_shrinking_norm_has_the_noise_of_the_one_that_clipped() -> None:
    size, shrink = 20_000, -3.0
    zeros = np.zeros(size, dtype=np.float32)
    row = zeros.copy()
    row[0] = 0.5
    results = [(None, FitRes(OK, ndarrays_to_parameters([row]), 1, {}))]
    for kind, expected in (
        (AdaptiveClipping, 1.0),
        (DifferentialPrivacyServerSideAdaptiveClipping, math.exp(shrink)),
    ):
        strategy = kind(FedAvg(), 1.0, 1, 1.0, 1.0, 1.0, 1e6)  # type: ignore[arg-type]
        strategy.current_round_params = [zeros]
        strategy.clipped_count_stddev = 0.0  # nothing is clipped, all should be: one step of 3
        strategy.clip_norm_lr = shrink
        aggregated, _ = strategy.aggregate_fit(1, list(results), [])  # type: ignore[arg-type]
        assert strategy.clipping_norm == pytest.approx(math.exp(shrink))
        noise = parameters_to_ndarrays(aggregated)[0][1:]
        check_noise(noise, expected)


def test_the_price_of_a_round() -> None:
    assert price(fixed(noise=2.0)) == 0.25
    assert price(fixed(noise=0.0)) == math.inf
    adaptive = AdaptiveClipping(FedAvg(), 1.0, 100, clipped_count_stddev=2.0)
    assert price(adaptive) == pytest.approx(1 - 1 / 16 + 1 / 4)  # 1/z² - 1/(2σ)² + 1/σ²


def test_a_round_is_paid_for_once(tmp_path: Path) -> None:
    federation = SmallFederation(tmp_path, NODES)
    server = federation.ferret(fixed(noise=2.0))
    federation.run(server, 3)
    assert server.spent == 0.75
    assert len(server.ledger) == 3


def test_local_privacy_sends_the_protocol_and_nothing_else(tmp_path: Path) -> None:
    be_a_node()
    settings = SETTINGS | {"privacy.mechanism": "local", "ferret.cache-dir": str(tmp_path)}
    federation = Federation(parse(settings), tmp_path)  # type: ignore[arg-type]
    server = federation.ferret()
    manager = SimpleClientManager()
    for proxy in federation.proxies:
        manager.register(proxy)
    server.initialize_parameters(manager)
    (_, request), *_ = server.configure_fit(1, ndarrays_to_parameters([]), manager)

    def answer(run: dict[str, object], own: dict[str, object]) -> FitRes:
        own = {"partition-id": 0, "num-partitions": 2, "ferret.cache-dir": str(tmp_path)} | own
        context = Context(1, 0, own, RecordDict(), run)  # type: ignore[arg-type]
        content = compat.fitins_to_recorddict(request, keep_input=True)
        message = Message(content, dst_node_id=0, message_type=MessageType.TRAIN)
        return compat.recorddict_to_fitres(app(message, context).content, keep_input=True)

    open_reply = answer(dict(SETTINGS), {})
    assert "train/loss" in open_reply.metrics
    (projected,) = parameters_to_ndarrays(open_reply.parameters)
    for run, own in (
        (SETTINGS | {"privacy.mechanism": "local", "privacy.clipping-norm": 3.0}, {}),
        (SETTINGS, {"privacy.mechanism": "local", "privacy.clipping-norm": 3.0}),
    ):
        reply = answer(dict(run), own)
        assert reply.num_examples == 1
        assert sorted(reply.metrics) == sorted(PROTOCOL)
        (noised,) = parameters_to_ndarrays(reply.parameters)
        check_noise(noised.astype(np.float64), 3.0)  # the update is short beside it
        assert np.linalg.norm(projected) < 1.0
