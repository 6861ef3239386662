"""Run a Flower project in this process: ``run_project.py FOLDER NODES ROUNDS``, from its folder.

Prints the losses that its server has measured and the bytes that have crossed, as JSON.
"""

import json
import logging
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from flwr.app import Context, RecordDict
from flwr.common.config import flatten_dict
from flwr.supercore.task_identity import TaskIdentity

sys.path[:0] = [str(Path.cwd()), str(Path(__file__).parents[2])]

from tests.plugin.conftest import Nodes  # noqa: E402

LOSSES: list[float] = []


class Losses(logging.Handler):
    """Reads the losses in what Flower says of the server's evaluations."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("initial parameters (loss"):
            LOSSES.append(float(record.args[0]))
        elif record.msg.startswith("fit progress"):
            LOSSES.append(float(record.args[1]))
        elif isinstance(record.args, Mapping) and "loss" in record.args:  # a MetricRecord alone
            LOSSES.append(float(record.args["loss"]))


def main(cache: str, nodes: int, rounds: int) -> None:
    """Run it."""
    for number in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, number, 1)
    logging.getLogger("flwr").addHandler(Losses())
    config = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config = flatten_dict(config) | {"num-server-rounds": rounds}
    import client_app
    import server_app

    grid = Nodes(client_app.app, Path(cache), nodes, config)
    grid.run = SimpleNamespace(run_id=1)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    server_app.app(grid, context)
    print(json.dumps({"losses": LOSSES, "bytes": grid.bytes}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
