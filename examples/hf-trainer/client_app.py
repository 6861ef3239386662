"""The node's side."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import load_data, make_model, train

app = ClientApp()


@app.train()
def train_fn(message: Message, context: Context) -> Message:
    """Train, and reply with the model."""
    partition = int(context.node_config["partition-id"])
    data = load_data(partition, int(context.node_config["num-partitions"]))
    model = make_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train(
        model,
        data,
        steps=int(context.run_config["local-steps"]),
        rate=float(context.run_config["learning-rate"]),
        seed=1000 * int(message.content["config"]["server-round"]) + partition,
    )
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(data)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
