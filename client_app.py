"""The node side: one call builds the client that answers one message."""

from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp

from ferret_flwr.flower.clientapp import client
from ferret_flwr.flower.mods import privacy_mod


def client_fn(context: Context) -> Client:
    """Build the client of this node from the run configuration and the node's own."""
    return client(context)


app = ClientApp(client_fn=client_fn, mods=[privacy_mod])
