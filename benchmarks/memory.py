"""The most memory that a process needs to answer one message, beside what the model itself takes.

Each row is a process that Flower would start for a message: it imports, loads the model and the
data, reaches the end of a ledger, and trains or evaluates one round with the app's own client. Its
peak over the imports is compared with parameters + largest gradient + activations, all in the
model's own type. Activations are what autograd keeps of one forward pass for the backward pass,
each storage once and no parameter; what operations need for a moment is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.message import SEED, K, _absolute, make_request

ROOT = Path(__file__).parents[1]
MEGABYTE = 1e6
NODES = 3
KINDS: dict[str, dict[str, Any]] = {  # what the rows differ in
    "forward passes only": {"train.memory": "lean", "train.max-grad-norm": 0.0},
    "lean": {"train.memory": "lean", "train.max-grad-norm": 0.0},
    "lean, clipped": {"train.memory": "lean", "train.max-grad-norm": 1.0},
    "standard": {"train.max-grad-norm": 0.0},
    "fedavg": {"method": "fedavg", "train.max-grad-norm": 0.0},
}


@dataclass(frozen=True)
class Need:
    """What the model and a batch take, whoever trains it: bytes."""

    parameters: int
    largest_gradient: int
    activations: int

    @property
    def total(self) -> int:
        """Return all three together."""
        return self.parameters + self.largest_gradient + self.activations


def need(settings: dict[str, Any]) -> Need:
    """Count the tensors of one forward pass over the first batch of a round."""
    import torch

    from ferret_flwr.config import parse
    from ferret_flwr.training.local import mean_loss
    from ferret_flwr.training.worker import Node

    node = Node.of(parse(settings), 0, NODES)
    model, sizes = node.worker.lm.model, [
        p.numel() * p.element_size() for p in node.worker.parameters.values()
    ]  # fmt: skip
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    drawn, _ = next(node.batches(1))
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = mean_loss(model, drawn, node.worker.lm.tokenizer.pad_token_id, 1)
    assert loss.requires_grad  # all that was packed is still held
    return Need(sum(sizes), max(sizes), sum(kept.values()))


def answer(folder: Path, kind: str) -> dict[str, float]:
    """Be the process that answers the request in ``folder``; return its peaks in bytes."""
    import numpy as np
    import torch  # noqa: F401
    from flwr.app import Context, RecordDict
    from flwr.common import Code, EvaluateIns, FitIns, ndarrays_to_parameters
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import client_app
    from ferret_flwr import memory
    from ferret_flwr.flower import FerretClient, comparison  # noqa: F401
    from ferret_flwr.methods import registry  # noqa: F401
    from ferret_flwr.training import worker  # noqa: F401

    imports = memory.peaks()["memory/peak_bytes"]
    memory.CLEAR = folder / "no" / "such"  # the client would forget the peak of loading the model
    request = json.loads((folder / "request.json").read_text())
    run, node = request["run"] | KINDS[kind], request["node"]
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
    config, name = request["config"], "request.npz"
    if kind == "fedavg":
        config, name = {"round": 1}, "weights.npz"
    with np.load(folder / name) as stored:
        parameters = ndarrays_to_parameters([stored[key] for key in stored.files])
    client = client_app.client_fn(context)
    if kind == "forward passes only":
        reply: Any = client.evaluate(EvaluateIns(parameters, config))
    else:
        reply = client.fit(FitIns(parameters, config))
    if reply.status.code != Code.OK or "error" in reply.metrics:
        raise SystemExit(f"the node failed: {reply.status.message} {reply.metrics.get('error')}")
    seconds = reply.metrics.get("time/local_s", 0.0) + reply.metrics.get("time/project_s", 0.0)
    return {"imports": imports, "train and project": seconds} | memory.peaks()


def make_requests(folder: Path, settings: dict[str, Any], rounds: int) -> None:
    """Write what a node is sent, as Ferret and as FedAvg."""
    import numpy as np

    from ferret_flwr.config import parse
    from ferret_flwr.training.models import load_model
    from ferret_flwr.training.tensors import as_arrays, trainable_parameters

    make_request(folder, settings, rounds)
    parameters = trainable_parameters(load_model(parse(settings).model).model)
    np.savez(folder / "weights.npz", *as_arrays(parameters.values()))


def measured(*arguments: str) -> dict[str, float]:
    """Return what a new process of this module prints."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(
    dtype: str, kinds: list[str], settings: dict[str, Any], rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each kind of process."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings | {"model.dtype": dtype}
        make_requests(folder, settings, rounds)
        of_model = Need(**measured("--need", json.dumps(settings)))
        for kind in kinds:
            subprocess.run(["rm", "-rf", folder / "cache"], check=True)
            found = measured("--answer", str(folder), "--kind", kind)
            peak = found.get("memory/gpu_peak_bytes", found["memory/peak_bytes"] - found["imports"])
            print(dtype, kind, f"{peak / MEGABYTE:.0f} MB", file=sys.stderr)
            rows.append(
                {
                    "dtype": dtype,
                    "kind": kind,
                    "parameters": of_model.parameters,
                    "largest gradient": of_model.largest_gradient,
                    "activations": of_model.activations,
                    "peak": peak,
                    "ratio": peak / of_model.total,
                    "seconds": found["train and project"],
                }
            )
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--model", default="builtin:tiny", help="default %(default)s")
    parser.add_argument("--dataset", default="builtin:tasks", help="default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=8, help="of the ledger, default %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="of training, default %(default)s")
    parser.add_argument("--batch-size", type=int, default=2, help="default %(default)s")
    parser.add_argument("--seq-length", type=int, default=256, help="default %(default)s")
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--need", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        return print(json.dumps(answer(options.answer, options.kind)))
    if options.need:
        return print(json.dumps(vars(need(options.need))))
    from benchmarks.header import header, header_text

    settings = {
        "seed": SEED,
        "model.name": _absolute(options.model),
        "model.device": options.device,
        "model.gradient-checkpointing": options.checkpointing,
        "dataset.name": _absolute(options.dataset),
        "dataset.too-long": "truncate",
        "dataset.max-examples": 1000,
        "train.steps": options.steps,
        "train.batch-size": options.batch_size,
        "train.seq-length": options.seq_length,
        "train.learning-rate": 0.01,
        "evaluate.batch-size": options.batch_size,
        "evaluate.max-examples": 4 * options.batch_size,
        "evaluate.generate-examples": 0,
        "strategy.fraction-evaluate": 1.0,
        "ferret.coefficients": K,
    }
    kinds = options.kinds
    rows = [row for d in options.dtypes for row in table(d, kinds, settings, options.rounds)]
    if options.json:
        return print(json.dumps({"rows": rows} | header(SEED), indent=2))
    columns = ("parameters", "largest gradient", "activations", "peak")
    print("| MB | " + " | ".join(columns) + " | ratio | train and project, s |")
    print("|---|" + "---|" * (len(columns) + 2))
    for row in rows:
        numbers = " | ".join(f"{row[column] / MEGABYTE:.0f}" for column in columns)
        print(
            f"| {row['dtype']}, {row['kind']} | {numbers} | {row['ratio']:.2f} "
            f"| {row['seconds']:.1f} |"
        )
    print(f"\n{header_text(header(SEED))}")


if __name__ == "__main__":
    main()
