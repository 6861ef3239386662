"""The server's side."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import load_data, make_model, test

app = ServerApp()


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Measure the global model on the test set."""
    model = make_model()
    model.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"loss": test(model, load_data())})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and keep the model."""
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(make_model().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
    model = make_model()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    model.save_pretrained("final_model")
