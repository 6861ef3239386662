"""Ferret for Flower: the strategy, the client, the mod, and what they send each other."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferret_flwr.flower.client import FerretClient
    from ferret_flwr.flower.mod import ferret_mod
    from ferret_flwr.flower.sharded import ShardedClient
    from ferret_flwr.flower.strategy import Ferret

__all__ = ["Ferret", "FerretClient", "ShardedClient", "ferret_mod"]


def __getattr__(name: str) -> Any:
    """Import on first use: a server needs no torch, a client no strategy."""
    if name == "Ferret":
        from ferret_flwr.flower.strategy import Ferret

        return Ferret
    if name == "FerretClient":
        from ferret_flwr.flower.client import FerretClient

        return FerretClient
    if name == "ferret_mod":
        from ferret_flwr.flower.mod import ferret_mod

        return ferret_mod
    if name == "ShardedClient":
        from ferret_flwr.flower.sharded import ShardedClient

        return ShardedClient
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
