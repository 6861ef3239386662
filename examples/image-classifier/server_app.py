"""The server's side."""

from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp
from task import get_weights, load_data, make_model, set_weights, test


def evaluate(server_round, arrays, config):
    """Measure the global model on the test set."""
    model = make_model()
    set_weights(model, arrays)
    loss, accuracy = test(model, *load_data())
    return loss, {"accuracy": accuracy}


def server_fn(context: Context) -> ServerAppComponents:
    """Return what Flower runs."""
    strategy = FedAvg(
        fraction_evaluate=0.0,
        initial_parameters=ndarrays_to_parameters(get_weights(make_model())),
        evaluate_fn=evaluate,
        on_fit_config_fn=lambda server_round: {"round": server_round},
    )
    config = ServerConfig(num_rounds=int(context.run_config["num-server-rounds"]))
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
