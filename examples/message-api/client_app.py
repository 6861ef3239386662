"""The node's side."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import load_data, make_model, test, train

app = ClientApp()


def load(message: Message, context: Context):
    """Return the global model and the node's data."""
    model = make_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    node = context.node_config
    return model, *load_data(int(node["partition-id"]), int(node["num-partitions"]))


@app.train()
def train_fn(message: Message, context: Context) -> Message:
    """Train, and reply with the model."""
    model, images, labels = load(message, context)
    loss = train(
        model,
        images,
        labels,
        epochs=int(context.run_config["local-epochs"]),
        rate=float(context.run_config["learning-rate"]),
        seed=1000 * int(message.content["config"]["server-round"])
        + int(context.node_config["partition-id"]),
    )
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(labels)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate_fn(message: Message, context: Context) -> Message:
    """Measure the model on the node's own data."""
    model, images, labels = load(message, context)
    loss, accuracy = test(model, images, labels)
    metrics = {"loss": loss, "accuracy": accuracy, "num-examples": len(labels)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
