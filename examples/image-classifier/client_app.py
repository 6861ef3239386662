"""The node's side."""

from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from task import get_weights, load_data, make_model, set_weights, test, train


class DigitsClient(NumPyClient):
    """Trains on the node's own images."""

    def __init__(self, context: Context) -> None:
        self.partition = int(context.node_config["partition-id"])
        count = int(context.node_config["num-partitions"])
        self.images, self.labels = load_data(self.partition, count)
        self.settings = context.run_config
        self.model = make_model()

    def fit(self, parameters, config):
        """Train, and return the model."""
        set_weights(self.model, parameters)
        loss = train(
            self.model,
            self.images,
            self.labels,
            epochs=int(self.settings["local-epochs"]),
            rate=float(self.settings["learning-rate"]),
            seed=1000 * int(config["round"]) + self.partition,
        )
        return get_weights(self.model), len(self.labels), {"train-loss": loss}

    def evaluate(self, parameters, config):
        """Measure the model on the node's own images."""
        set_weights(self.model, parameters)
        loss, accuracy = test(self.model, self.images, self.labels)
        return loss, len(self.labels), {"accuracy": accuracy}


def client_fn(context: Context):
    """Return the client of a node."""
    return DigitsClient(context).to_client()


app = ClientApp(client_fn=client_fn)
