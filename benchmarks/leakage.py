"""Tell from what a node sends whether an example was in its batch: from γ, or from all of Δ.

The attacker is the server: it knows the parameters, the bases and the candidate examples. For each
candidate it computes the gradient g and correlates Vᵀg with γ (with the full update: g with Δ). It
also knows what an average example does, from examples of its own: what the mean of their gradients
explains is taken out of both sides first. The AUC is the chance that an example of the batch
correlates more than one that was not there; 0.5 is guessing. Better attacks may exist.

A second table reads a block of parameters out: its relative error after K_l numbers about it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.header import header, header_text
from ferret_flwr.config import Config
from ferret_flwr.projection import projection
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.training.data import Examples, collate, load_examples, tokenize
from ferret_flwr.training.local import negative_log_likelihood, train_locally
from ferret_flwr.training.models import LanguageModel, load_model
from ferret_flwr.training.randomness import permutation
from ferret_flwr.training.tensors import load_masters, masters_of, trainable_parameters

COEFFICIENTS = (512, 2048, 8192)
TRIALS = {1: 32, 4: 16, 16: 8, 64: 4}  # examples in the batch -> batches in a repetition
MEMBERS, OTHERS, KNOWN = 320, 96, 64  # examples: of the node, never there, the attacker's own
REPEATS, SEED = 3, 42
TUNED_STEPS = 200
READ_OUT = (64, 120, 128, 136, 160, 256)  # numbers about a block of 128 parameters
CONFIG = Config()


class Attack:
    """What the attacker holds in one round: the parameters, and gradients of candidates.

    Parameters
    ----------
    lm
        At the parameters before the round.
    examples
        Candidates.
    """

    def __init__(self, lm: LanguageModel, examples: Examples) -> None:
        """Compute each candidate's gradient: float32, ``(examples, d)``."""
        self.lm = lm
        self.examples = examples
        self.parameters = trainable_parameters(lm.model)
        self.layout = Layout.of(self.parameters)
        self.before = masters_of(self.parameters)
        self.gradients = np.stack([self._gradient(i) for i in range(len(examples))])

    def _gradient(self, i: int) -> np.ndarray:
        tokens = tokenize(
            self.examples[i], self.lm.tokenizer, CONFIG.train.seq_length, CONFIG.dataset.too_long
        )
        assert tokens is not None
        batch = collate([tokens], self.lm.tokenizer.pad_token_id)
        gradients = torch.autograd.grad(
            negative_log_likelihood(self.lm.model, batch)[0].sum(), list(self.parameters.values())
        )
        return np.concatenate([g.numpy().ravel() for g in gradients])

    def update(self, batch: Sequence[int], steps: int) -> np.ndarray:
        """Return Δ of a node that trains on ``batch`` with SGD, as the node itself would."""
        load_masters(self.parameters, self.before)
        train = replace(CONFIG.train, steps=steps, batch_size=len(batch) // steps)
        train_locally(
            self.lm.model,
            [self.examples[i] for i in batch],
            self.lm.tokenizer,
            train,
            too_long=CONFIG.dataset.too_long,
            seed=SEED,
            partition_id=0,
            round=1,
            num_rounds=1,
        )
        after = masters_of(self.parameters)
        return np.concatenate([(b - a).ravel() for b, a in zip(self.before, after, strict=True)])

    def project(self, vectors: np.ndarray, plan: RoundPlan) -> np.ndarray:
        """Return γ of each row of ``vectors``: ``(rows, K)``."""
        cuts, shapes = self.layout.offsets[1:-1], self.layout.shapes
        return np.stack(
            [
                projection.project(
                    [
                        part.reshape(shape)
                        for part, shape in zip(np.split(row, cuts), shapes, strict=True)
                    ],
                    self.layout,
                    plan,
                )
                for row in vectors
            ]
        )


def uniform_plan(size: int, coefficients: int, seed: int) -> RoundPlan:
    """Return a round of ``coefficients`` bases, one for each interleaved block."""
    blocks = InterleavedBlocks.of(size, coefficients)
    return RoundPlan(1, seed, CONFIG.ferret.family, blocks)


def without(average: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return ``rows`` without what ``average`` explains of them, each of length 1."""
    along = rows @ average / (average @ average)
    left = rows - along[..., None] * average
    return left / np.linalg.norm(left, axis=-1, keepdims=True)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Return the chance that a member scores higher than another, ties counting half."""
    higher = (members[:, None] > others).mean()
    return float(higher + 0.5 * (members[:, None] == others).mean())


def measure(lm: LanguageModel, examples: Examples) -> list[dict[str, Any]]:
    """Return one row of AUCs for each number of examples in the batch."""
    attack = Attack(lm, examples)
    found: dict[tuple[int, int], dict[str, list[float]]] = {}
    for repeat in range(REPEATS):
        order = permutation(len(examples), "roles", SEED, repeat)
        members, others, known = np.split(order, [MEMBERS, MEMBERS + OTHERS])
        plans = {k: uniform_plan(attack.layout.size, k, SEED + repeat) for k in COEFFICIENTS}
        seen = {"full": attack.gradients} | {
            str(k): attack.project(attack.gradients, plan) for k, plan in plans.items()
        }
        average = {name: rows[known].mean(axis=0) for name, rows in seen.items()}
        seen = {name: without(average[name], rows) for name, rows in seen.items()}
        default = CONFIG.train.steps
        kinds = [(n, 1, trials) for n, trials in TRIALS.items()] + [(MEMBERS, default, 1)]
        for n, steps, trials in kinds:
            row = found.setdefault((n, steps), {})
            for trial in range(trials):
                batch = members[trial * n : (trial + 1) * n]
                delta = attack.update(batch, steps)
                sent = {"full": delta} | {
                    str(k): attack.project(delta[None], plan)[0] for k, plan in plans.items()
                }
                for name, rows in seen.items():
                    seen_in = without(average[name], sent[name])
                    inside, outside = rows[batch] @ seen_in, rows[others] @ seen_in
                    row.setdefault(name, []).append(auc(inside, outside))
                    if name == "full":
                        row.setdefault("correlation", []).append(float(np.median(inside)))
    return [
        {"examples": n, "steps": steps}
        | {name: float(np.mean(values)) for name, values in row.items()}
        | {f"{name} error": _error(values) for name, values in row.items()}
        for (n, steps), row in found.items()
    ]


def _error(values: list[float]) -> float:
    """Return the standard error of the mean."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def read_out(counts: Sequence[int] = READ_OUT, seeds: int = 9) -> dict[int, float]:
    """Return the median relative error of Δ_l from K_l float32 numbers, by least squares."""
    size = 128
    errors: dict[int, list[float]] = {count: [] for count in counts}
    for seed in range(seeds):
        delta = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
        for count in counts:
            plan = RoundPlan(1, seed, "rademacher", Blocks(size, size), np.array([count]))
            bases = np.stack([reference.basis_elements(plan, k, 0, size) for k in range(count)])
            gamma = projection.project([delta], Layout(("w",), ((size,),)), plan)
            found = np.linalg.lstsq(
                bases.astype(np.float64), gamma.astype(np.float32).astype(np.float64), rcond=None
            )[0]
            errors[count].append(float(np.linalg.norm(found - delta) / np.linalg.norm(delta)))
    return {count: float(np.median(values)) for count, values in errors.items()}


def figures() -> dict[str, Any]:
    """Return everything measured: at the base model, after some training, and the read-out."""
    began = time.perf_counter()
    lm = load_model(CONFIG.model)
    examples = load_examples(CONFIG.dataset, seed=SEED).train
    pool = examples[: MEMBERS + OTHERS + KNOWN]
    found: dict[str, Any] = {"base": measure(lm, pool)}
    lm = load_model(CONFIG.model)
    train_locally(  # on other examples
        lm.model,
        examples[len(pool) :],
        lm.tokenizer,
        replace(CONFIG.train, steps=TUNED_STEPS),
        too_long=CONFIG.dataset.too_long,
        seed=SEED,
        partition_id=0,
        round=1,
        num_rounds=1,
    )
    found["tuned"] = measure(lm, pool)
    return found | {"read-out": read_out(), "seconds": time.perf_counter() - began}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leakage", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is small
    numba.set_num_threads(1)
    found = figures()
    if arguments.json:
        print(json.dumps(found | header(SEED), indent=2))
        return
    names = [*map(str, COEFFICIENTS), "full"]
    print(
        f"| parameters | examples | {' | '.join(f'K = {k}' for k in COEFFICIENTS)} | full update |"
    )
    print("|---" * (len(names) + 2) + "|")
    for state in ("base", "tuned"):
        for row in found[state]:
            batch = f"{row['examples']}" + (f" in {row['steps']} steps" * (row["steps"] > 1))
            cells = (f"{row[name]:.3f} ± {row[f'{name} error']:.3f}" for name in names)
            print(f"| {state} | {batch} | {' | '.join(cells)} |")
    print()
    print("| numbers about 128 parameters |", " | ".join(map(str, READ_OUT)), "|")
    print("|---" * (len(READ_OUT) + 1) + "|")
    print("| relative error |", " | ".join(f"{e:.1g}" for e in found["read-out"].values()), "|")
    print(f"\n{header_text(header(SEED))}")


if __name__ == "__main__":
    main()
