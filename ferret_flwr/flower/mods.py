"""Flower's mods that clip and add noise on a node, for coefficients."""

from __future__ import annotations

import math

import numpy as np
from flwr.app import Context, Message, MessageType
from flwr.client.mod import LocalDpMod
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common import FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat

from ferret_flwr.config import PrivacyConfig
from ferret_flwr.flower.private import not_all_zero
from ferret_flwr.flower.site import Site

PROTOCOL = ("round", "seed", "fingerprint", "cached", "partition-id")  # all that the server needs


def on_coefficients(mod: Mod) -> Mod:
    """Return ``mod`` as it acts on coefficients, for ``ClientApp(mods=[...])``.

    Flower's `fixedclipping_mod` and `LocalDpMod` change the difference between what a node sends
    and what it received. It received a ledger's rounds, so they are shown zeros instead. An
    answer that holds no coefficients, but the reason why, passes as it is.
    """

    def applied(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        answer = call_next(msg, ctxt)
        reply = _coefficients_in(msg, answer)
        return answer if reply is None else _show(mod, msg, ctxt, answer, reply)

    return applied


def privacy_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Clip and add noise where run-config or node-config have `privacy.mechanism` = local.

    Beside the coefficients it sends what the protocol needs: no loss, no times, no number of
    examples.
    """
    answer = call_next(msg, ctxt)
    asked = {**ctxt.run_config, **ctxt.node_config}.get("privacy.mechanism")
    reply = _coefficients_in(msg, answer) if asked == "local" else None
    if reply is None:
        return answer
    config = Site.of(ctxt).config.privacy
    reply.num_examples = 1
    reply.metrics = {key: reply.metrics[key] for key in PROTOCOL if key in reply.metrics}
    return _show(_local(config), msg, ctxt, answer, reply)


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
    answer.content = compat.fitres_to_recorddict(reply, keep_input=True)
    request = compat.recorddict_to_fitins(msg.content, keep_input=True)
    request.parameters = ndarrays_to_parameters([np.zeros_like(projected)])
    msg.content = compat.fitins_to_recorddict(request, keep_input=True)
    return mod(msg, ctxt, lambda *_: answer)
