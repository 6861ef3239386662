"""Where the seconds of a message go, in a process that Flower would start for it.

In a deployment every message to a node starts a Python process, which imports, loads the model and
the data, reaches the end of the ledger, trains one round, and projects. Each column is such a
process: the first finds an empty cache folder, the second what the first has left there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports are what is timed
    from ferret_flwr.config import FerretConfig
    from ferret_flwr.ledger import Header, Ledger

ROOT = Path(__file__).parents[1]
K = 8192
SEED = 42


@contextmanager
def timed(phases: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to ``phases``."""
    start = time.perf_counter()
    yield
    phases[name] = phases.get(name, 0.0) + time.perf_counter() - start


def answer(folder: Path) -> None:
    """Be the process: answer the request in ``folder``, and print the seconds of each phase."""
    phases = {"start Python": time.time() - float(os.environ["STARTED"])}
    with timed(phases, "import flwr and the app"):
        import numpy as np
        from flwr.app import Context, RecordDict
        from flwr.common import Code, FitIns, ndarrays_to_parameters

        import client_app
    with timed(phases, "import torch"):
        import torch  # noqa: F401
    with timed(phases, "import transformers"):
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    with timed(phases, "import the rest of the app"):
        from ferret_flwr.flower import FerretClient  # noqa: F401
        from ferret_flwr.training import worker
    loads: dict[str, float] = {}
    for function, name in (("load_model", "load the model"), ("load_examples", "read the data")):
        setattr(worker, function, watched(loads, name, getattr(worker, function)))
    request = json.loads((folder / "request.json").read_text())
    with np.load(folder / "request.npz") as stored:
        arrays = [stored[name] for name in stored.files]
    context = Context(
        run_id=1,
        node_id=1,
        node_config=request["node"],
        state=RecordDict(),
        run_config=request["run"],
    )
    fit: dict[str, float] = {}
    with timed(fit, "all"):
        client = client_app.client_fn(context)
        reply = client.fit(FitIns(ndarrays_to_parameters(arrays), request["config"]))
    metrics = reply.metrics
    if reply.status.code != Code.OK or "error" in metrics:
        raise SystemExit(f"the node failed: {reply.status.message} {metrics.get('error')}")
    parts = {
        "reach the end of the ledger": float(metrics["time/reconstruct_s"]),
        "train": float(metrics["time/local_s"]),
        "project": float(metrics["time/project_s"]),
    }
    rest = {"the rest": fit["all"] - sum(parts.values()) - sum(loads.values())}
    print(json.dumps(phases | loads | parts | rest))


def watched(phases: dict[str, float], name: str, function: Callable[..., Any]) -> Any:
    """Return ``function`` with its seconds added to ``phases``."""

    def call(*arguments: Any, **named: Any) -> Any:
        with timed(phases, name):
            return function(*arguments, **named)

    return call


def made_up_ledger(header: Header, config: FerretConfig, rounds: int) -> Ledger:
    """Return a ledger of ``rounds`` made-up rounds."""
    import numpy as np

    from ferret_flwr.ledger import Ledger
    from ferret_flwr.rounds import next_plan, publish

    ledger, rng = Ledger(header), np.random.default_rng(SEED)
    for _ in range(rounds):
        plan = next_plan(ledger, config, SEED)
        tiny = rng.normal(0, 1e-7, plan.num_coefficients)  # a spoilt model computes slowly
        ledger = ledger.append(publish(plan, tiny, 1.0))
    return ledger


def make_request(folder: Path, settings: dict[str, Any], rounds: int) -> None:
    """Write a request to train behind a ledger of ``rounds`` made-up rounds."""
    import numpy as np

    from ferret_flwr.config import parse
    from ferret_flwr.flower import wire
    from ferret_flwr.replica import Replica
    from ferret_flwr.rounds import next_plan
    from ferret_flwr.training.tensors import masters_of
    from ferret_flwr.training.worker import Worker

    config = parse(settings)
    worker = Worker(config.model)
    replica = Replica(worker.layout, masters_of(worker.parameters), config.model.dtype)
    ledger = made_up_ledger(replica.header, config.ferret, rounds)
    replica.follow(ledger)
    ledger = ledger.with_fingerprint(replica.fingerprint)
    plan = next_plan(ledger, config.ferret, SEED)
    parameters, entry = wire.encode(wire.Request.of(ledger, 0, plan))
    from flwr.common import parameters_to_ndarrays

    np.savez(folder / "request.npz", *parameters_to_ndarrays(parameters))
    node = {"partition-id": 0, "num-partitions": 3, "ferret.cache-dir": str(folder / "cache")}
    node |= {key: settings[key] for key in ("model.name", "dataset.name")}
    content = {"run": settings, "node": node, "config": entry}
    (folder / "request.json").write_text(json.dumps(content))


def measure(folder: Path, app: Path) -> dict[str, float]:
    """Return the phases of a new process that runs the app in ``app``."""
    done = subprocess.run(
        [sys.executable, Path(__file__).resolve(), "--answer", folder],
        cwd=app,
        env=os.environ | {"PYTHONPATH": str(app), "STARTED": str(time.time())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _absolute(name: str) -> str:
    """Return a path that means the same in another checkout, or a name as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.message", description=__doc__)
    parser.add_argument("--model", default="builtin:tiny", help="default %(default)s")
    parser.add_argument("--dataset", default="builtin:tasks", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=8, help="of the ledger, default %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="of training, default %(default)s")
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        return answer(options.answer)
    from benchmarks.header import header, header_text  # the process above has no need of it

    settings = {
        "model.name": _absolute(options.model),
        "dataset.name": _absolute(options.dataset),
        "dataset.too-long": "truncate",
        "train.steps": options.steps,
        "train.batch-size": 2,
        "train.seq-length": 256,
        "train.learning-rate": 0.01,
        "ferret.coefficients": K,
    }
    columns: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_request(folder, settings, options.rounds)
        apps = {"": ROOT} | ({"beside, ": options.beside.resolve()} if options.beside else {})
        for app in apps.values():  # compile the kernels, and read every file once
            measure(folder, app)
        subprocess.run(["rm", "-rf", folder / "cache"], check=True)
        for who, app in apps.items():
            for cache in ("empty cache", "cache"):
                columns[who + cache] = measure(folder, app)
    if options.json:
        print(json.dumps({"columns": columns} | header(SEED), indent=2))
        return
    print(f"{'seconds':<36}" + "".join(f"{name:>22}" for name in columns))
    for phase in next(iter(columns.values())):
        print(f"{phase:<36}" + "".join(f"{c[phase]:>22.2f}" for c in columns.values()))
    beyond = [sum(c.values()) - c["train"] for c in columns.values()]
    print(f"{'all but training':<36}" + "".join(f"{s:>22.2f}" for s in beyond))
    print(f"\n{header_text(header(SEED))}")


if __name__ == "__main__":
    main()
