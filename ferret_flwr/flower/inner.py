"""Which of Flower's strategies may stand inside `Ferret`, and why the others may not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.common import FitRes, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import (
    Bulyan,
    DPFedAvgFixed,
    FedAvg,
    FedAvgAndroid,
    FedAvgM,
    FedMedian,
    FedOpt,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    FedXgbNnAvg,
    Krum,
    QFedAvg,
    Strategy,
)

from ferret_flwr.config import ConfigError, FerretConfig, PrivacyConfig, StrategyConfig
from ferret_flwr.flower.private import check_private, equal_shares, private, wrapper_of
from ferret_flwr.flower.replies import FitResult
from ferret_flwr.projection.plan import RoundPlan

OF_WEIGHTS = (
    "keeps weights or moments from round to round; here each round has bases of its own, and "
    "numbers on the bases of different rounds cannot be added. Use FedAvg with "
    "'ferret.server-rate' and 'ferret.rate-schedule' on the server (in a project of your own "
    "FerretConfig(server_rate=..., rate_schedule=...)), or momentum or Adam in the nodes' optimizer"
)
OF_OTHER_MODELS = "aggregates something else than a vector of numbers"
REFUSED: dict[type[Strategy], str] = {
    FedOpt: OF_WEIGHTS,  # FedAdam, FedAdagrad, FedYogi
    FedAvgM: OF_WEIGHTS,
    QFedAvg: OF_WEIGHTS,
    FedXgbBagging: OF_OTHER_MODELS,
    FedXgbCyclic: OF_OTHER_MODELS,
    FedXgbNnAvg: OF_OTHER_MODELS,
    FedAvgAndroid: OF_OTHER_MODELS,
    DPFedAvgFixed: "adds noise for clipping that no client of today does, so it gives no privacy. "
    "Use DifferentialPrivacyServerSideFixedClipping",
}


def chain(strategy: Any, kind: type = Strategy) -> Iterator[Any]:
    """Yield ``strategy``, of Flower's interface ``kind``, and what it wraps, outermost first."""
    link = strategy
    while isinstance(link, kind):
        yield link
        link = getattr(link, "strategy", None)


def refuse(links: Iterable[Any], kinds: Mapping[Any, str]) -> None:
    """Raise `ConfigError` if one of ``links`` is of ``kinds``, which name a reason each."""
    for link in links:
        for kind, reason in kinds.items():
            if isinstance(link, kind):
                raise ConfigError(f"{type(link).__name__} cannot stand inside Ferret: it {reason}")


def check_bases(strategy: Any, config: FerretConfig, fedavg: type) -> None:
    """Raise `ConfigError` if bases are per client and ``strategy`` is not plain ``fedavg``."""
    if config.bases == "per-client" and type(strategy) is not fedavg:
        raise ConfigError(
            f"'ferret.bases' = 'per-client' needs FedAvg inside, got {strategy!r}: numbers on "
            "different bases cannot be aggregated otherwise"
        )


def averages(strategy: Strategy) -> bool:
    """Tell whether ``strategy`` takes Flower's weighted mean, whatever else it changes."""
    return getattr(type(strategy), "aggregate_fit", None) is FedAvg.aggregate_fit


def check_inner(strategy: Strategy, config: FerretConfig) -> None:
    """Raise `ConfigError` if ``strategy``, or what it wraps, cannot aggregate coefficients."""
    links = list(chain(strategy))
    refuse(links, REFUSED)
    check_private(links, config)


def aggregate(
    strategy: Strategy,
    plan: RoundPlan,
    server_round: int,
    results: list[FitResult],
    failures: list[FitResult | BaseException],
    chosen: int,
) -> tuple[np.ndarray | None, dict[str, Scalar]]:
    """Let ``strategy`` aggregate coefficients.

    What is not a mean may compare lengths and distances. So it is handed γ / √(ρ K_l), whose
    squared norm has mean ‖Δ‖², and what it returns is taken back; with interleaved signs the
    factor is 1.

    Parameters
    ----------
    strategy
        The one inside `Ferret`.
    plan
        The round's bases.
    server_round, results, failures
        As Flower's.
    chosen
        How many nodes were asked.

    Returns
    -------
    tuple
        γ as the strategy aggregates it, ``(K,)``, or None; and its metrics.
    """
    scale: np.ndarray | None = np.sqrt(plan.unbiased_scale())
    if averages(strategy) or np.all(scale == 1.0):
        scale = None
    if scale is not None:
        results = [(client, _scaled(reply, scale)) for client, reply in results]
    if wrapper := wrapper_of(list(chain(strategy))):
        results, failures = equal_shares(wrapper, results, chosen), []  # it would give up for one
    aggregated, metrics = strategy.aggregate_fit(
        server_round=server_round, results=results, failures=failures
    )
    if aggregated is None:
        return None, metrics
    projected = parameters_to_ndarrays(aggregated)[0]
    return projected if scale is None else projected / scale, metrics


def _scaled(reply: FitRes, scale: np.ndarray) -> FitRes:
    (projected,) = parameters_to_ndarrays(reply.parameters)
    scaled = (projected * scale).astype(np.float32)
    return replace(reply, parameters=ndarrays_to_parameters([scaled]))


def build_inner(
    config: StrategyConfig, privacy: PrivacyConfig, sampling: Mapping[str, Any]
) -> Strategy:
    """Return the strategy that `strategy.name` and `privacy.mechanism` ask for.

    Parameters
    ----------
    config
        Its name and its parameters.
    privacy
        What is put around it.
    sampling
        Which nodes take part, as `FedAvg` names it.
    """
    malicious: dict[str, Any] = {"num_malicious_clients": config.malicious_nodes}
    if config.name == "fedmedian":
        return FedMedian(**sampling)
    if config.name == "trimmed-mean":
        return FedTrimmedAvg(**sampling, beta=config.trim)
    if config.name == "krum":
        return Krum(**sampling, **malicious)
    if config.name == "multi-krum":
        return Krum(**sampling, **malicious, num_clients_to_keep=config.keep_nodes)
    if config.name == "bulyan":
        return Bulyan(**sampling, **malicious, to_keep=0)  # Flower's rule has no default for it
    return private(FedAvg(**sampling), privacy, config.min_train_nodes)
