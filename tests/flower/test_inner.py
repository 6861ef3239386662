"""Which strategies may stand inside `Ferret`, and how a run-config names them."""

import inspect
import re

import flwr.server.strategy as flowers
import pytest
from flwr.server.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    Strategy,
)

from ferret_flwr.config import ConfigError, parse
from ferret_flwr.flower import Ferret
from ferret_flwr.flower.inner import REFUSED, build_inner
from ferret_flwr.flower.private import PRIVATE

ALLOWED = ("FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "Bulyan", "FedProx")
ALLOWED += ("FaultTolerantFedAvg",)


def kinds() -> list[type[Strategy]]:
    """Return all of Flower's strategies."""
    members = inspect.getmembers(flowers, inspect.isclass)
    return [kind for _, kind in members if issubclass(kind, Strategy) and kind is not Strategy]


def test_every_strategy_of_flowers_is_judged() -> None:
    """A new one must be looked at before it passes."""
    known = (*REFUSED, *PRIVATE)
    unjudged = [
        k.__name__ for k in kinds() if k.__name__ not in ALLOWED and not issubclass(k, known)
    ]
    assert not unjudged


def bare(kind: type[Strategy]) -> Strategy:
    """Return a strategy whose constructor has not run: only its kind counts."""
    return kind.__new__(kind)


@pytest.mark.parametrize("kind", [k for k in kinds() if issubclass(k, tuple(REFUSED))])
def test_what_keeps_weights_is_refused_with_what_to_use_instead(kind: type[Strategy]) -> None:
    with pytest.raises(ConfigError, match=f"{kind.__name__} cannot stand inside Ferret: it "):
        Ferret(bare(kind))


def test_so_is_what_is_made_of_it() -> None:
    class Mine(FedAvgM):
        """Somebody's own."""

    with pytest.raises(ConfigError, match="Mine .* the bases of different rounds .*server-rate"):
        Ferret(Mine(server_momentum=0.9))
    private = DifferentialPrivacyServerSideFixedClipping(bare(FedAdam), 1.0, 1.0, 2)
    with pytest.raises(ConfigError, match="FedAdam"):
        Ferret(private)


SEVEN = {"strategy.min-train-nodes": 7, "strategy.min-available-nodes": 7}


@pytest.mark.parametrize(
    ("settings", "kind", "attributes"),
    [
        ({}, FedAvg, {}),
        ({"strategy.name": "fedmedian"}, FedMedian, {}),
        ({"strategy.name": "trimmed-mean", "strategy.trim": 0.3}, FedTrimmedAvg, {"beta": 0.3}),
        (
            {"strategy.name": "krum", "strategy.malicious-nodes": 2} | SEVEN,
            Krum,
            {"num_malicious_clients": 2, "num_clients_to_keep": 0},
        ),
        (
            {"strategy.name": "multi-krum", "strategy.keep-nodes": 5} | SEVEN,
            Krum,
            {"num_malicious_clients": 0, "num_clients_to_keep": 5},
        ),
        (
            {"strategy.name": "bulyan", "strategy.malicious-nodes": 1} | SEVEN,
            Bulyan,
            {"num_malicious_clients": 1, "aggregation_rule_kwargs": {"to_keep": 0}},
        ),
    ],
    ids=str,
)
def test_a_run_config_names_the_strategy(
    settings: dict[str, object], kind: type[FedAvg], attributes: dict[str, object]
) -> None:
    config = parse(settings)  # type: ignore[arg-type]
    strategy = build_inner(config.strategy, config.privacy, {"min_fit_clients": 7})
    assert type(strategy) is kind
    assert strategy.min_fit_clients == 7
    assert {name: getattr(strategy, name) for name in attributes} == attributes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy.name": "median"}, "'strategy.name' must be one of fedavg, fedmedian"),
        ({"strategy.trim": 0.3}, "'strategy.trim' = 0.3 is for 'strategy.name' = 'trimmed-mean'"),
        ({"strategy.keep-nodes": 2}, "'strategy.keep-nodes' = 2 is for .* 'multi-krum', got"),
        ({"strategy.malicious-nodes": 1}, "for 'strategy.name' = 'krum' or 'multi-krum' or"),
        (
            {"strategy.name": "krum", "strategy.malicious-nodes": 3} | SEVEN,
            "among at least 9 nodes a round: set 'strategy.min-train-nodes' to 9 or more, got 7",
        ),
        (
            {"strategy.name": "bulyan", "strategy.malicious-nodes": 2} | SEVEN,
            "among at least 11 nodes",
        ),
        (
            {"strategy.name": "multi-krum", "strategy.keep-nodes": 6}
            | {"strategy.malicious-nodes": 2}
            | SEVEN,
            "'strategy.keep-nodes' must leave the malicious ones out: at most .* = 5, got 6",
        ),
        (
            {"strategy.name": "fedmedian", "ferret.bases": "per-client"},
            "'per-client' needs 'strategy.name' = 'fedavg'",
        ),
        (
            {"strategy.name": "fedmedian", "method": "fedavg"},
            "'strategy.name' = 'fedmedian' needs 'method' = 'ferret'",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_what_contradicts_itself_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(settings)  # type: ignore[arg-type]
    assert re.search(message, str(caught.value))
