"""Flower's differential privacy inside `Ferret`: what makes its guarantee hold for coefficients.

Flower's wrappers clip what the nodes sent and add noise of standard deviation zC/n to what the
strategy inside them returns. That is (ε, δ) of the accountant's only if the strategy takes the
plain mean of n vectors, which is what `equal_shares` provides whoever fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from flwr.common import (
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from flwr.supercore.differential_privacy import add_gaussian_noise_to_params

from ferret_flwr.config import ConfigError, FerretConfig, PrivacyConfig
from ferret_flwr.flower.replies import FitResult

PRIVATE = (
    DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
)
AROUND_KEYS = ("clipping_norm", "dpfedavg_clip_norm")  # that Flower's wrappers add to requests
ROUNDING = 1e-5  # by which a vector that was clipped in float32 may be too long
NEARLY_ZERO = np.float32(1e-15)  # its square is no zero in float32


class AdaptiveClipping(DifferentialPrivacyServerSideAdaptiveClipping):
    """Flower's adaptive clipping with two things put right that Flower 1.41 has wrong.

    Its norm runs away from the quantile instead of towards it: it shrinks where too many vectors
    are clipped. And it scales the noise by the norm of the next round, not by that which clipped,
    so that a shrinking norm gives less noise than is accounted for. Arguments are Flower's.
    """

    def __init__(
        self,
        strategy: Strategy,
        noise_multiplier: float,
        num_sampled_clients: int,
        initial_clipping_norm: float = 0.1,
        target_clipped_quantile: float = 0.5,
        clip_norm_lr: float = 0.2,
        clipped_count_stddev: float | None = None,
    ) -> None:
        """Turn the direction of the norm's steps round."""
        super().__init__(
            strategy,
            noise_multiplier,
            num_sampled_clients,
            initial_clipping_norm,
            target_clipped_quantile,
            clip_norm_lr,
            clipped_count_stddev,
        )
        self.clip_norm_lr = -clip_norm_lr

    def aggregate_fit(
        self,
        server_round: int,
        results: list[FitResult],
        failures: list[FitResult | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Add what noise is missing where the norm has become smaller: variances add up."""
        clipped_at = self.clipping_norm
        aggregated, metrics = super().aggregate_fit(server_round, results, failures)
        missing = clipped_at**2 - self.clipping_norm**2
        if aggregated is not None and missing > 0:
            aggregated = add_gaussian_noise_to_params(
                aggregated, self.noise_multiplier, math.sqrt(missing), self.num_sampled_clients
            )
        return aggregated, metrics


def check_private(links: Sequence[Strategy], config: FerretConfig) -> None:
    """Raise `ConfigError` unless the noise of the wrapper among ``links`` is what it promises.

    Parameters
    ----------
    links
        The strategy inside `Ferret` and what it wraps, outermost first.
    config
        The projection.
    """
    wrappers = [link for link in links if isinstance(link, PRIVATE)]
    if not wrappers:
        return
    name, innermost = type(wrappers[0]).__name__, links[-1]
    if len(wrappers) > 1:
        raise ConfigError(f"{name} wraps another wrapper for differential privacy: one is enough")
    if getattr(type(innermost), "aggregate_fit", None) is not FedAvg.aggregate_fit:
        raise ConfigError(
            f"{name} around {type(innermost).__name__}: its noise is for a plain mean, one node "
            "may change anything else by more; use FedAvg"
        )
    for link in wrappers:
        if isinstance(link, DifferentialPrivacyClientSideAdaptiveClipping) or (
            isinstance(link, DifferentialPrivacyServerSideAdaptiveClipping)
            and not isinstance(link, AdaptiveClipping)
        ):
            raise ConfigError(
                f"{name} of Flower 1.41 scales its noise by the norm of the next round, less than "
                "its noise multiplier promises where the norm shrinks, and its norm runs away from "
                "the quantile; use ferret_flwr.flower.private.AdaptiveClipping"
            )
        if isinstance(link, DifferentialPrivacyClientSideFixedClipping):
            check_lengths(config, name)


def check_lengths(config: FerretConfig, owner: str) -> None:
    """Raise `ConfigError` unless γ is about as long as the update, which ``owner`` relies on."""
    if config.blocks or config.family != "rademacher":
        raise ConfigError(
            f"{owner} clips what a node sends by its length: that is the update's with "
            "'ferret.blocks' = 0 and 'ferret.family' = 'rademacher' only"
        )
    if config.number_format != "float32":
        raise ConfigError(f"{owner} changes numbers: 'ferret.number-format' must be 'float32'")


def wrapper_of(links: Sequence[Strategy]) -> Strategy | None:
    """Return the wrapper for differential privacy among ``links``, if there is one."""
    return next((link for link in links if isinstance(link, PRIVATE)), None)


def price(wrapper: Strategy) -> float:
    """Return 1 / z² of one round of ``wrapper``, see `accounting`.

    For adaptive clipping the noised number of clipped vectors is released as well. A node changes
    it by 1 at most (Andrew et al., 2021, centre it for 1/2, Flower does not).
    """
    z = wrapper.noise_multiplier  # type: ignore[attr-defined]
    count = getattr(wrapper, "clipped_count_stddev", math.inf)
    return 1 / z**2 + 1 / count**2 if z and count else math.inf


def equal_shares(wrapper: Strategy, results: Sequence[FitResult], chosen: int) -> list[FitResult]:
    """Return one reply for each node that was chosen, all of the same weight.

    Who failed or was refused counts as zeros, so the mean's denominator is known before the round
    and one node changes the mean by C / ``chosen`` at most. Flower weighs by examples, which
    would let a node change it by nearly C, and averages over whoever replied.
    """
    wrapper.num_sampled_clients = chosen  # type: ignore[attr-defined]
    shares = [(client, _share(reply)) for client, reply in results]
    client, pattern = shares[0]
    nothing = np.zeros_like(parameters_to_ndarrays(pattern.parameters)[0])
    absent = replace(pattern, parameters=ndarrays_to_parameters([nothing]), metrics={})
    return shares + [(client, _share(absent)) for _ in range(chosen - len(shares))]


def _share(reply: FitRes) -> FitRes:
    (projected,) = parameters_to_ndarrays(reply.parameters)
    return replace(
        reply, parameters=ndarrays_to_parameters([not_all_zero(projected)]), num_examples=1
    )


def not_all_zero(projected: np.ndarray) -> np.ndarray:
    """Return coefficients that Flower can clip: it divides by their norm."""
    if projected.any():
        return projected
    return np.full_like(projected, NEARLY_ZERO)


def check_clipped(wrapper: Strategy | None, projected: np.ndarray) -> None:
    """Raise `ValueError` if the node should have clipped ``projected`` and has not."""
    if isinstance(wrapper, DifferentialPrivacyClientSideFixedClipping):
        norm = float(np.linalg.norm(projected.astype(np.float64)))
        if norm > wrapper.clipping_norm * (1 + ROUNDING):
            raise ValueError(
                f"its coefficients are {norm:.3g} long and should have been clipped to "
                f"{wrapper.clipping_norm:g}: its ClientApp needs "
                "mods=[on_coefficients(fixedclipping_mod)]"
            )


def untouchable() -> Parameters:
    """Return what `Ferret` hands to Flower in the place of weights.

    A wrapper *around* `Ferret` would add its noise to that, where no replica ever sees it. Numpy
    cannot compute with such an array, and its error shows the field's name.
    """
    words = "Ferret must be the outermost strategy: Ferret(strategy=DifferentialPrivacy...)"
    return ndarrays_to_parameters([np.zeros(1, dtype=[(words, "u1")])])


def check_outermost(requests: Iterable[FitIns]) -> None:
    """Raise `ConfigError` if a wrapper around `Ferret` has told the nodes to clip."""
    for request in requests:
        for key in AROUND_KEYS:
            if key in request.config:
                raise ConfigError(
                    f"a strategy around Ferret sends '{key}': its noise would reach no node. "
                    "Ferret must be the outermost: Ferret(strategy=DifferentialPrivacy...)"
                )


def private(strategy: FedAvg, config: PrivacyConfig, nodes: int) -> Strategy:
    """Return ``strategy`` with the central mechanism of ``config`` around it, if there is one.

    Parameters
    ----------
    strategy
        Takes the mean.
    config
        `privacy.*`.
    nodes
        That a round is expected to have; the noise is for those that it has.
    """
    if config.mechanism == "central-fixed":
        return DifferentialPrivacyServerSideFixedClipping(
            strategy, config.noise_multiplier, config.clipping_norm, nodes
        )
    if config.mechanism == "central-adaptive":
        return AdaptiveClipping(
            strategy,
            config.noise_multiplier,
            nodes,
            initial_clipping_norm=config.clipping_norm,
            target_clipped_quantile=config.clipped_share,
            clip_norm_lr=config.clipping_rate,
            clipped_count_stddev=config.count_stddev,
        )
    return strategy
