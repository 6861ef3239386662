"""Flower's mods that clip and add noise on a node, for coefficients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from flwr.app import Context, Message, MessageType
from flwr.client.mod import LocalDpMod, secaggplus_mod
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common import FitRes, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import (
    RECORD_KEY_CONFIGS,
    RECORD_KEY_STATE,
)
from flwr.compat.common import recorddict_compat as compat

from ferret_flwr.config import ConfigError, PrivacyConfig
from ferret_flwr.flower import wire
from ferret_flwr.flower.private import not_all_zero
from ferret_flwr.flower.site import Site

PROTOCOL = ("round", "seed", "fingerprint", "cached", "partition-id")  # all that the server needs


def on_coefficients(mod: Mod) -> Mod:
    """Return ``mod`` as it acts on coefficients, for ``ClientApp(mods=[...])``.

    Flower's ``fixedclipping_mod`` and ``LocalDpMod`` change the difference between what a node
    sends and what it received. It received a ledger's rounds, so they are shown zeros instead. An
    answer that holds no coefficients, but the reason why, passes as it is.
    """

    def applied(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        answer = call_next(msg, ctxt)
        reply = _coefficients_in(msg, answer)
        return answer if reply is None else _show(mod, msg, ctxt, answer, reply)

    return applied


def privacy_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Do what run-config and node-config ask for in `privacy.*`, before anything leaves the node.

    With `privacy.mechanism` = local, clip and add noise. With `privacy.secure-aggregation`, mask
    the coefficients, and answer no request to train without. In both cases a node sends the
    coefficients and what the protocol needs: no loss, no times, no number of examples.

    Raises
    ------
    ConfigError
        If the node is asked for coefficients in clear and may only send masked ones.
    """
    if msg.metadata.message_type != MessageType.TRAIN:
        return call_next(msg, ctxt)
    if not _asked(ctxt, "privacy.secure-aggregation"):
        return _with_noise(msg, ctxt, call_next)
    if RECORD_KEY_CONFIGS not in msg.content.config_records:
        raise ConfigError("this node trains with secure aggregation only, and was asked without")
    return secaggplus_mod(msg, ctxt, lambda m, c: _to_be_masked(m, c, call_next))


def _asked(ctxt: Context, key: str) -> Scalar | None:
    """Return what run-config or node-config ask for; either is enough."""
    return ctxt.node_config.get(key) or ctxt.run_config.get(key)


def _with_noise(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    answer = call_next(msg, ctxt)
    local = "local" in (c.get("privacy.mechanism") for c in (ctxt.run_config, ctxt.node_config))
    reply = _coefficients_in(msg, answer) if local else None
    if reply is None:
        return answer
    config = Site.of(ctxt).config.privacy
    if config.mechanism != "local":
        return answer
    return _show(_local(config), msg, ctxt, answer, _reduced(reply))


def _to_be_masked(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Return an answer that survives masking, or raise: then the others go on without this node.

    Behind the mask NaN would be noise in everybody's mean, and what is out of range cut off.
    """
    answer = _with_noise(msg, ctxt, call_next)
    reply = _coefficients_in(msg, answer)
    if reply is None:
        error = "it has no coefficients" if answer.has_error() else _error_in(answer)
        raise ValueError(f"nothing to mask: {error}")
    (projected,) = parameters_to_ndarrays(reply.parameters)
    limit = float(ctxt.state.config_records[RECORD_KEY_STATE]["clipping_range"])  # type: ignore[arg-type]
    largest = float(np.abs(projected).max())  # NaN if there is one
    if not largest <= limit:
        raise ValueError(
            f"not masked: the largest coefficient is {largest:g}, allowed is {limit:g}"
        )
    answer.content = compat.fitres_to_recorddict(_reduced(reply), keep_input=True)
    return answer


def _error_in(answer: Message) -> str:
    reply = compat.recorddict_to_fitres(answer.content, keep_input=True)
    return str(reply.metrics.get("error", "it has no coefficients"))


def _reduced(reply: FitRes) -> FitRes:
    """Return the reply without what says more than the coefficients."""
    metrics = {key: reply.metrics[key] for key in PROTOCOL if key in reply.metrics}
    return replace(reply, num_examples=1, metrics=metrics)


def _local(config: PrivacyConfig) -> LocalDpMod:
    """Return Flower's mod with noise of standard deviation z C; it knows ε of a round only."""
    delta = config.delta
    return LocalDpMod(
        clipping_norm=config.clipping_norm,
        sensitivity=config.clipping_norm,
        epsilon=math.sqrt(2 * math.log(1.25 / delta)) / config.noise_multiplier,
        delta=delta,
    )


def _coefficients_in(msg: Message, answer: Message) -> FitRes | None:
    if msg.metadata.message_type != MessageType.TRAIN or answer.has_error():
        return None
    reply = compat.recorddict_to_fitres(answer.content, keep_input=True)
    return reply if len(reply.parameters.tensors) == 1 else None


def _show(mod: Mod, msg: Message, ctxt: Context, answer: Message, reply: FitRes) -> Message:
    """Let ``mod`` change ``reply`` as if the node had been sent zeros."""
    (projected,) = parameters_to_ndarrays(reply.parameters)
    reply.parameters = ndarrays_to_parameters([not_all_zero(projected)])
    reply.metrics = wire.without_still(reply.metrics)
    answer.content = compat.fitres_to_recorddict(reply, keep_input=True)
    request = compat.recorddict_to_fitins(msg.content, keep_input=True)
    request.parameters = ndarrays_to_parameters([np.zeros_like(projected)])
    msg.content = compat.fitins_to_recorddict(request, keep_input=True)
    return mod(msg, ctxt, lambda *_: answer)
