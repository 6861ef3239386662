"""``ferret-flwr``: look at a machine, plan a run, and turn a ledger into a model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ferret_flwr.config import ConfigError, FerretConfig, ModelConfig
from ferret_flwr.ledger import Ledger, LedgerError, coefficients_nbytes, payload_nbytes
from ferret_flwr.projection import projection
from ferret_flwr.projection.allocation import ALLOCATIONS, allocate, expected_fidelity
from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout, LayoutError
from ferret_flwr.projection.plan import PlanError, RoundPlan
from ferret_flwr.replica import Replica, ReplicaError
from ferret_flwr.report import environment, nbytes_text
from ferret_flwr.rounds import bases_per_block, block_energies, blocks_for

if TYPE_CHECKING:
    from ferret_flwr.training.models import LanguageModel


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 1 after printing one error."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except ModuleNotFoundError as error:
        print(
            f"ferret-flwr: error: {error.name} is not installed: pip install 'ferret-flwr[train]'",
            file=sys.stderr,
        )
        return 1
    except tuple(_expected_errors()) as error:
        print(f"ferret-flwr: error: {error}", file=sys.stderr)
        return 1
    return 0


def _expected_errors() -> list[type[Exception]]:
    errors: list[type[Exception]] = [
        ConfigError, LedgerError, LayoutError, PlanError, ReplicaError, OSError
    ]  # fmt: skip
    if "torch" in sys.modules:
        from ferret_flwr.training.errors import DataError, ModelError

        errors += [DataError, ModelError]
    return errors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ferret-flwr", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, devices, and the kernels that work here")
    info.set_defaults(command=_info)

    plan = commands.add_parser("plan", help="what a run of a model would cost and give")
    _add_model_options(plan, "--model")
    default = FerretConfig()
    plan.add_argument("--coefficients", "-k", type=int, default=default.coefficients, metavar="K")
    plan.add_argument(
        "--blocks",
        type=int,
        default=default.blocks,
        metavar="L",
        help="contiguous blocks; 0 = K interleaved ones",
    )
    plan.add_argument("--family", choices=list(FAMILIES), default=default.family)
    plan.add_argument("--allocation", choices=list(ALLOCATIONS), default=default.allocation)
    plan.add_argument("--max-per-block", type=int, default=default.max_per_block)
    plan.add_argument(
        "--ledger", type=Path, help="take the blocks' energies from this run, not from a gradient"
    )
    plan.set_defaults(command=_plan)

    ledger = commands.add_parser("ledger", help="look at a ledger, check it, apply it")
    actions = ledger.add_subparsers(required=True, metavar="ACTION")
    for name, command, text in (
        ("show", _ledger_show, "print the rounds"),
        ("verify", _ledger_verify, "replay it on its base model and compare the fingerprints"),
        ("apply", _ledger_apply, "base model + ledger = a Hugging Face folder"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("file", type=Path)
        action.set_defaults(command=command)
        if name != "show":
            _add_model_options(action, "--base")
        if name == "apply":
            action.add_argument("--output", type=Path, required=True, metavar="DIR")
    return parser


def _add_model_options(parser: argparse.ArgumentParser, name: str) -> None:
    default = ModelConfig()
    parser.add_argument(
        name, dest="model", required=True, help="built-in, local folder, GGUF file, or Hub id"
    )
    parser.add_argument("--revision", default=default.revision)
    parser.add_argument("--gguf-file", default=default.gguf_file)
    parser.add_argument(
        "--dtype",
        choices=ModelConfig.__dataclass_fields__["dtype"].metadata["choices"],
        default="",
        help="default: the ledger's, or float32",
    )
    parser.add_argument("--trust-remote-code", action="store_true")


def _model_config(options: argparse.Namespace, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(
        name=options.model,
        revision=options.revision,
        dtype=options.dtype or dtype,
        gguf_file=options.gguf_file,
        trust_remote_code=options.trust_remote_code,
    )


def _info(options: argparse.Namespace) -> None:
    import numba

    for name, version in environment().items():
        print(f"{name:<14} {version}")
    print(f"{'processors':<14} {os.cpu_count()}, {numba.get_num_threads()} numba threads")
    name = _cuda_device()
    print(f"{'CUDA device':<14} {name or 'none'}")
    kernels = f"reference: live; cpu (numba): {_kernel_error() or 'live'}"
    if name and "torch" not in name:
        kernels += f"; cuda (triton): {_kernel_error('cuda') or 'live'}"
    print(f"{'kernels':<14} {kernels}")


def _cuda_device() -> str:
    """Return the name of the GPU, "" if there is none."""
    try:
        import torch
    except ImportError:
        return "unknown, torch is not installed"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _kernel_error(device: str = "") -> str:
    """Return "" if the fast kernel gives the reference's bits here, else what is wrong.

    On ``device`` if that is one of torch's, else that for NumPy arrays.
    """
    from ferret_flwr.projection.arrays import to_host
    from ferret_flwr.projection.kernels import reference

    layout = Layout(("probe",), ((1000,),))
    dealt, cut = InterleavedBlocks.of(1000, 300), Blocks.of(1000, 4)
    for blocks, counts in ((dealt, None), (cut, np.full(cut.count, 2))):
        plan = RoundPlan(1, 1, "rademacher", blocks, counts)
        coefficients = np.linspace(-1, 1, plan.num_coefficients, dtype=np.float32)
        array: Any = np.ones(1000, dtype=np.float32)
        try:
            if device:
                import torch

                array = torch.from_numpy(array).to(device)
            projection.subtract([array], layout, plan, coefficients)
        except Exception as error:  # a compiler can fail in any way
            return f"{type(error).__name__}: {error}"
        expected = 1 - reference.reconstruct(coefficients, plan)
        if to_host(array).tobytes() != expected.tobytes():
            return "differs from the reference"
    return ""


def _plan(options: argparse.Namespace) -> None:
    from ferret_flwr.training.forecast import projection_seconds
    from ferret_flwr.training.models import load_model
    from ferret_flwr.training.tensors import trainable_parameters

    config = FerretConfig(
        coefficients=options.coefficients,
        blocks=options.blocks,
        family=options.family,
        allocation=options.allocation,
        max_per_block=options.max_per_block,
    )
    lm = load_model(_model_config(options))
    parameters = trainable_parameters(lm.model)
    layout = Layout.of(parameters)
    blocks = blocks_for(layout.size, config)
    if isinstance(blocks, InterleavedBlocks):
        if options.ledger is not None:
            raise ConfigError("--ledger tells energies of contiguous blocks, see --blocks")
        plan = RoundPlan(2, 0, config.family, blocks)
        kind = f"{blocks.count:,} interleaved, one basis each"
        cosines = [f"cos {np.sqrt(blocks.count / layout.size):.4f} ≈ √(K/d), whatever the update"]
    else:
        plan, kind, cosines = _plan_of_contiguous(options, config, lm, layout, blocks)
    up = coefficients_nbytes(plan)
    down = payload_nbytes(plan)
    seconds = projection_seconds(plan)
    model_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
    replica_bytes = 4 * layout.size
    rows = [
        ("model", f"{options.model}, {layout.size:,} trainable parameters in {len(layout.names)} "
         f"tensors"),
        ("coefficients", f"K = {plan.num_coefficients:,} ({config.family})"),
        ("blocks", f"L = {kind}"),
        ("a node sends", f"{nbytes_text(up)} a round; FedAvg {nbytes_text(model_bytes)}, "
         f"{model_bytes / up:,.0f} times as much"),
        ("a node receives", f"{nbytes_text(down)} a round if it took part in the last one"),
        *zip(("fidelity", ""), cosines, strict=False),
        ("projection", f"{seconds:.3f} s here, and about as much to reconstruct a round"),
        ("memory", f"{nbytes_text(2 * model_bytes + replica_bytes)} for weights, gradients and "
         "replica, besides the optimizer's state and activations"),
    ]  # fmt: skip
    for name, text in rows:
        print(f"{name:<16} {text}")


def _plan_of_contiguous(
    options: argparse.Namespace, config: FerretConfig, lm: LanguageModel, layout: Layout,
    blocks: Blocks,
) -> tuple[RoundPlan, str, list[str]]:  # fmt: skip
    """Return the plan of a round behind the first, what its blocks are, and what it gives."""
    from ferret_flwr.training.forecast import gradient_energies

    if options.ledger is not None:
        energies = block_energies(_ledger_for(options, layout, blocks), blocks, config)
        source = f"the ledger '{options.ledger}'"
    else:
        energies, source = gradient_energies(lm, layout, blocks), "one gradient of this model"
    counts = bases_per_block(energies, blocks, config)
    first = allocate("uniform", energies, blocks, config.coefficients)
    kind = (
        f"{blocks.count:,} of {blocks.block_size:,} parameters; bases per block {counts.min()} to "
        f"{counts.max()} ({config.allocation})"
    )
    cosines = [
        f"cos {np.sqrt(config.coefficients / layout.size):.4f} ≈ √(K/d) for an even update",
        f"cos {expected_fidelity(energies, blocks, first):.4f} in round 1 (uniform), "
        f"{expected_fidelity(energies, blocks, counts):.4f} after it, with energies from {source}",
    ]
    return RoundPlan(2, 0, config.family, blocks, counts), kind, cosines


def _ledger_for(options: argparse.Namespace, layout: Layout, blocks: Blocks) -> Ledger:
    """Load ``--ledger``, which must tell something about these blocks of this model."""
    ledger = Ledger.load(options.ledger)
    this = replace(ledger.header, layout=layout.fingerprint, size=layout.size)
    ledger.header.check(this, f"'{options.model}'")
    known = {e.plan.blocks for e in ledger.entries if isinstance(e.plan.blocks, Blocks)}
    if blocks not in known:
        counts = ", ".join(str(other.count) for other in known) or "none"
        raise LedgerError(
            f"'{options.ledger}' says nothing about {blocks.count} blocks, it has {counts}: "
            "see --blocks"
        )
    return ledger


def _ledger_show(options: argparse.Namespace) -> None:
    ledger = Ledger.load(options.file)
    header = ledger.header
    print(f"base model   fingerprint {header.base}, layout {header.layout}")
    print(f"parameters   {header.size:,}")
    print(f"head         {ledger.head}")
    print(f"size         {nbytes_text(ledger.nbytes)} in {len(ledger)} rounds\n")
    titles = ("round", "family", "seeds", "blocks", "K", "max K_l", "rate", "parameters after")
    print("{:>5}  {:<16} {:>5} {:>11} {:>8} {:>7} {:>7}  {}".format(*titles))
    for entry in ledger.entries:
        plan = entry.plan
        print(
            f"{entry.round:>5}  {plan.family:<16} {len(entry.seeds):>5} "
            f"{'interleaved' if plan.interleaved else plan.blocks.count:>11} "
            f"{plan.num_coefficients:>8} {plan.counts.max():>7} {entry.rate:>7.3g}  "
            f"{entry.fingerprint or '(not known)'}"
        )


def _replay(options: argparse.Namespace) -> tuple[object, Replica, Ledger]:
    """Return the base model, a replica of it at the ledger's end, and the ledger."""
    from ferret_flwr.training.models import load_model
    from ferret_flwr.training.tensors import masters_of, trainable_parameters

    ledger = Ledger.load(options.file)
    lm = load_model(_model_config(options, ledger.header.dtype))
    parameters = trainable_parameters(lm.model)
    replica = Replica(Layout.of(parameters), masters_of(parameters))
    ledger.header.check(replica.header, f"'{options.model}'")
    for round in range(1, len(ledger) + 1):
        replica.follow(ledger.until(round))
        print(f"round {round}: {replica.fingerprint}")
    return lm, replica, ledger


def _ledger_verify(options: argparse.Namespace) -> None:
    _, _, ledger = _replay(options)
    known = sum(bool(entry.fingerprint) for entry in ledger.entries)
    print(f"verified: {len(ledger)} rounds, {known} of them with a fingerprint to compare")


def _ledger_apply(options: argparse.Namespace) -> None:
    from ferret_flwr.training.saving import save_model
    from ferret_flwr.training.tensors import load_masters, trainable_parameters

    if options.output.exists():
        raise FileExistsError(f"'{options.output}' exists already; name another --output")
    lm, replica, _ = _replay(options)
    load_masters(trainable_parameters(lm.model), replica.arrays)  # type: ignore[attr-defined]
    save_model(lm, options.output)  # type: ignore[arg-type]
    print(f"written to {options.output}")


if __name__ == "__main__":
    sys.exit(main())
