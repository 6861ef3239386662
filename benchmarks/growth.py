"""Time what grows with parameters, coefficients, clients and rounds, beside the expected lines.

Each sweep varies one number. What is expected follows from what the code does with it:

- a copy, a projection and a reconstruction touch each of d parameters once;
- with interleaved blocks each parameter has one basis, so K does not matter until K sums leave the
  processor's caches; with L contiguous blocks each has K/L bases, and reading it costs about as
  much as two more;
- the server reads each reply once, and each costs something however short it is;
- a replay takes every round off all parameters and fingerprints them once; a snapshot is read and
  fingerprinted, whatever the number of rounds it stands for.

Nothing is fitted: a line of one term has half the points above, a line of two goes through the
first and the last, and says where the other points should be. Seconds are medians of some turns, as
many as a time limit allows, of the wall clock; the server's are the processor's, as in
`benchmarks.scale`. Parameters are changed in place, so d of them take 4 d bytes and little more;
sizes that do not fit into the memory that is free give way to the largest that does.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.header import header, header_text
from benchmarks.kernels import (
    BASES,
    SEED,
    check_kernels,
    contiguous,
    in_turns,
    interleaved,
    seconds,
)
from benchmarks.message import made_up_ledger
from benchmarks.scale import Federation
from benchmarks.sweeps import Sweep, Work, constant, draw, linear
from benchmarks.tables import seconds_text
from ferret_flwr import memory
from ferret_flwr.config import FerretConfig
from ferret_flwr.files import write_atomic
from ferret_flwr.ledger import Ledger
from ferret_flwr.projection import projection
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.kernels.cpu import COST_OF_MEMORY
from ferret_flwr.projection.layout import Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.replica import Replica
from ferret_flwr.snapshot import Snapshots

TURNS, ENOUGH = 15, 6.0  # as many turns at most, and no more after so many seconds
SPARE = 2**31  # bytes of memory that are left to others
KERNELS = ("project", "reconstruct")
SAMPLE = 4096  # the last elements, which are compared with the reference at every size
START, END = "<!-- benchmarks.growth -->", "<!-- end -->"

Row = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """What the sweeps go through, each ascending.

    Attributes
    ----------
    sizes
        d.
    bases
        K of ``bases_size`` parameters; the first is also L of the contiguous blocks.
    clients
        That reply in a round of ``client_bases`` coefficients.
    reply_bases
        K of a round in which ``reply_clients`` reply.
    rounds
        Of a ledger for ``ledger_size`` parameters.
    """

    sizes: Sequence[int] = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9)
    bases: Sequence[int] = tuple(2**n for n in range(10, 21, 2))
    bases_size: int = 2**24
    clients: Sequence[int] = (10, 100, 1000, 10_000)
    client_bases: int = BASES
    reply_bases: Sequence[int] = tuple(2**n for n in range(10, 21, 2))
    reply_clients: int = 50
    rounds: Sequence[int] = (1, 3, 10, 30, 100, 300, 1000)
    ledger_size: int = 10**7

    def contradiction(self) -> str:
        """Return what is wrong with the sizes, "" if nothing is."""
        for name, value in asdict(self).items():
            several = (value,) if isinstance(value, int) else value
            option = f"--{name.replace('_', '-')}"
            if min(several) < 1 or any(b <= a for a, b in pairwise(several)):
                return f"{option} must be positive and ascending, got {value}"
            if not isinstance(value, int) and len(value) < 3:
                return f"{option} must be at least three numbers, or any line fits, got {value}"
        if any(bases % self.bases[0] for bases in self.bases) or self.bases[-1] > self.bases_size:
            return f"--bases must be multiples of the first, up to {self.bases_size}"
        return ""


QUICK = Sizes(
    sizes=(10**5, 10**6, 10**7),
    bases=(2**10, 2**12, 2**14),
    bases_size=2**20,
    clients=(10, 30, 100),
    client_bases=1024,
    reply_bases=(2**10, 2**13, 2**16),
    reply_clients=10,
    rounds=(1, 10, 100),
    ledger_size=10**5,
)


def free_memory() -> int:
    """Return the bytes of memory that can be taken without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    raise SystemExit("/proc/meminfo does not say how much memory is free")


def fitting(sizes: Sequence[int]) -> Iterator[int]:
    """Yield the ascending ``sizes`` that fit into memory, each checked when its turn comes."""
    last = 0
    for size in sizes:
        gc.collect()
        most = (free_memory() - SPARE) // 4
        if size > most:
            most -= most % 10**7
            say(f"d = {size:,} does not fit into the memory that is free; {max(last, most):,} does")
            if most > last:
                yield most
            return
        yield size
        last = size


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def told(what: str, row: Row, works: Sequence[Work]) -> Row:
    """Return ``row`` when its seconds are told."""
    say(f"{what}: " + ", ".join(f"{w.name} {seconds_text(row[w.name])} s" for w in works))
    return row


def both(array: np.ndarray, layout: Layout, plan: RoundPlan) -> list[Callable[[], Any]]:
    """Return a projection, and a reconstruction that spoils nothing however often it is done."""
    c = np.full(plan.num_coefficients, 1e-9, dtype=np.float32)
    return [
        partial(projection.project, [array], layout, plan),
        partial(projection.subtract, [array], layout, plan, c),
    ]


def timed(works: Sequence[Work], calls: Sequence[Callable[[], Any]]) -> dict[str, np.ndarray]:
    """Return the seconds of each work's call in some turns."""
    named = dict(zip((work.name for work in works), calls, strict=True))
    return in_turns(named, TURNS, warm_ups=0, enough=ENOUGH)


def medians(taken: Mapping[str, np.ndarray]) -> Row:
    """Return the median of each work's seconds."""
    return {name: float(np.median(values)) for name, values in taken.items()}


def parameters(size: int) -> tuple[np.ndarray, Layout]:
    """Return ``size`` random parameters as one tensor."""
    vector = torch.empty(size).normal_(generator=torch.Generator().manual_seed(SEED))
    return vector.numpy(), Layout(("vector",), ((size,),))


def check_last(array: np.ndarray, layout: Layout, plan: RoundPlan) -> None:
    """Reconstruct a round, and compare the last parameters with the reference.

    Raises
    ------
    SystemExit
        If a bit of them is different.
    """
    first = max(0, array.size - SAMPLE)
    c = np.random.default_rng(SEED).standard_normal(plan.num_coefficients, np.float32)
    update = c[reference.block_of(plan, first, array.size)]
    expected = array[first:] - update * reference.basis_elements(plan, 0, first, array.size)
    projection.subtract([array], layout, plan, c)
    if array[first:].tobytes() != expected.tobytes():
        raise SystemExit(f"not timed: the kernels disagree with the reference at d = {array.size}")


BY_SIZE = tuple(Work(name, "∝ d", (linear,)) for name in ("copy", *KERNELS))


def time_size(size: int) -> Row:
    """Return the seconds for ``size`` parameters, how they compare, and the memory it takes."""
    memory.start()
    before = memory.peaks().get("memory/peak_bytes", 0)
    array, layout = parameters(size)
    plan = interleaved(size, BASES, "rademacher")
    check_last(array, layout, plan)
    vector, half = torch.from_numpy(array), size // 2
    copy = partial(vector[half : 2 * half].copy_, vector[:half])
    taken = timed(BY_SIZE, [copy, *both(array, layout, plan)])
    taken["copy"] *= 2  # it was of one half to the other
    row = medians(taken)
    for name in KERNELS:
        row[f"{name} / copy"] = float(np.median(taken[name] / taken["copy"]))
    peak = memory.peaks().get("memory/peak_bytes", 0) - before
    return told(f"d = {size:,}", row | {"peak memory / 4 d bytes": peak / (4 * size)}, BY_SIZE)


def by_size(sizes: Sizes) -> Sweep:
    """Time vectors of more and more parameters."""
    rows = {size: time_size(size) for size in fitting(sizes.sizes)}
    return Sweep.of(f"Parameters: K = {BASES}, interleaved", "d", BY_SIZE, rows)


def by_bases(sizes: Sizes) -> Sweep:
    """Time more and more bases for one vector, interleaved and on contiguous blocks."""
    size, least = sizes.bases_size, sizes.bases[0]
    law = f"∝ {COST_OF_MEMORY} + K/{least}"
    works = (
        *(Work(name, "constant", (constant,)) for name in KERNELS),
        *(
            Work(f"{name}, {least} blocks", law, (lambda k: COST_OF_MEMORY + k / least,))
            for name in KERNELS
        ),
    )
    array, layout = parameters(size)
    rows = {}
    for count in sizes.bases:
        dealt = interleaved(size, count, "rademacher")
        cut = contiguous(size, least, count // least, "rademacher")
        check_last(array, layout, dealt)
        calls = [*both(array, layout, dealt), *both(array, layout, cut)]
        rows[count] = told(f"K = {count:,}", medians(timed(works, calls)), works)
    return Sweep.of(f"Coefficients: d = {size:,}, interleaved or contiguous", "K", works, rows)


SERVER = ("aggregate", "round")


def time_server(clients: int, bases: int) -> tuple[float, float]:
    """Return the server's seconds in `Ferret.aggregate_fit`, and in a whole round."""
    with tempfile.TemporaryDirectory() as folder:
        server = Federation(clients, clients, bases, Path(folder))
        server.run()  # in the first round nobody has a part of the ledger yet
        rounds, began = [], time.perf_counter()
        while len(rounds) < TURNS and (not rounds or time.perf_counter() - began < ENOUGH):
            rounds.append(server.run())
    return median(r["aggregate"] for r in rounds), median(sum(r.values()) for r in rounds)


def by_clients(sizes: Sizes) -> Sweep:
    """Time the server with more and more replies in a round."""
    bases = sizes.client_bases
    works = [Work(f"{name}, K = {bases}", "constant + N", (constant, linear)) for name in SERVER]
    rows = {}
    for clients in sizes.clients:
        taken = time_server(clients, bases)
        row = dict(zip((work.name for work in works), taken, strict=True))
        rows[clients] = told(f"{clients:,} replies", row, works)
        row["round / N, ms"] = 1000 * taken[1] / clients
    return Sweep.of(f"Clients: K = {bases}", "N", works, rows, unit=bases)


def by_reply(sizes: Sizes) -> Sweep:
    """Time the server with longer and longer replies."""
    clients = sizes.reply_clients
    works = [Work(f"{name}, N = {clients}", "constant + K", (constant, linear)) for name in SERVER]
    rows = {}
    for bases in sizes.reply_bases:
        row = dict(zip((work.name for work in works), time_server(clients, bases), strict=True))
        rows[bases] = told(f"{clients} replies of K = {bases:,}", row, works)
    return Sweep.of(f"Length of a reply: N = {clients}", "K", works, rows, unit=clients)


BY_ROUNDS = (
    Work("replay", "constant + rounds", (constant, linear)),
    Work("snapshot", "constant", (constant,)),
)


def time_ledger(ledger: Ledger, base: np.ndarray, layout: Layout, folder: Path) -> Row:
    """Return the seconds from the base to the end of ``ledger``, and from a snapshot's file."""
    replays: list[float] = []
    while len(replays) < TURNS and sum(replays) < ENOUGH:
        replica = Replica(layout, [base.copy()])
        replays.append(seconds(partial(reach, replica, ledger)))
    named = ledger.with_fingerprint(replica.fingerprint)
    snapshots = Snapshots(folder)
    snapshots.save(replica.fingerprint, replica.arrays)
    loads: list[float] = []
    while len(loads) < TURNS and sum(loads) < ENOUGH:
        leave_memory(folder / f"{replica.fingerprint}.npy")
        loads.append(seconds(partial(load, snapshots, named, layout)))
    return {"replay": median(replays), "snapshot": median(loads)}


def reach(replica: Replica, ledger: Ledger) -> str:
    """Replay ``ledger``, and return the fingerprint that is compared with the server's."""
    replica.follow(ledger)
    return replica.fingerprint


def load(snapshots: Snapshots, ledger: Ledger, layout: Layout) -> None:
    """Read the parameters at the end of ``ledger`` and compare their fingerprint."""
    if snapshots.newest(ledger, layout, "float32", after=0) is None:
        raise SystemExit("not timed: the snapshot is not what the replay has led to")


def leave_memory(path: Path) -> None:
    """Let the next who reads a file read it from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def by_rounds(sizes: Sizes) -> Sweep:
    """Replay longer and longer ledgers, and read a snapshot of what they lead to."""
    base, layout = parameters(sizes.ledger_size)
    header_of = Replica(layout, [base]).header
    ledger = made_up_ledger(header_of, FerretConfig(coefficients=BASES), sizes.rounds[-1])
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in sizes.rounds:
            row = time_ledger(ledger.until(count), base, layout, Path(folder))
            rows[count] = told(f"{count:,} rounds", row, BY_ROUNDS)
    return Sweep.of(f"Rounds: d = {layout.size:,}, K = {BASES}", "rounds", BY_ROUNDS, rows)


def crossing(sweep: Sweep) -> int:
    """Return the least number of rounds that a snapshot is faster than, by the expected lines."""
    replay, snapshot = sweep.curves
    first, second = replay.expected((1, 2))
    goal = float(snapshot.expected((1,))[0])
    return max(1, math.floor((goal - first) / (second - first)) + 2)


PANELS: dict[str, tuple[Callable[[Sizes], Sweep], ...]] = {  # by what x is in the plot
    "parameters d": (by_size,),
    "coefficients K": (by_bases,),
    "numbers that a server receives in a round, N K": (by_clients, by_reply),
    "rounds of a ledger": (by_rounds,),
}


def measure(sizes: Sizes) -> dict[str, list[Sweep]]:
    """Return the sweeps of each panel."""
    check_kernels()
    return {label: [sweep(sizes) for sweep in sweeps] for label, sweeps in PANELS.items()}


def markdown(panels: Mapping[str, Sequence[Sweep]], about: Mapping[str, Any]) -> str:
    """Return all tables, and what they depend on."""
    sweeps = [sweep for own in panels.values() for sweep in own]
    pays = (
        f"By these lines a snapshot is faster than replaying {crossing(sweeps[-1])} rounds or more."
    )
    return "\n\n".join([*(sweep.markdown() for sweep in sweeps), pays, header_text(about)])


def has_marks(path: Path) -> bool:
    """Return whether a page has a place for the tables."""
    return path.is_file() and END in path.read_text().partition(START)[2]


def write_into(path: Path, text: str) -> None:
    """Replace what stands between the marks in a file."""
    before, _, rest = path.read_text().partition(START)
    _, _, after = rest.partition(END)
    write_atomic(path, f"{before}{START}\n\n{text}\n\n{END}{after}".encode())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, less than a minute")
    for name, default in asdict(Sizes()).items():
        several = {} if isinstance(default, int) else {"nargs": "+"}
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", **several)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, help="a PNG or SVG file")
    parser.add_argument("--into", type=Path, help=f"a page: tables go behind its {START}")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in asdict(Sizes())}
    sizes = replace(
        QUICK if options.quick else Sizes(),
        **{name: value for name, value in given.items() if value is not None},
    )
    if wrong := sizes.contradiction():
        parser.error(wrong)
    if options.into and not has_marks(options.into):
        parser.error(f"there is no {START} before an {END} in {options.into}")
    about = header(SEED)  # of the code that runs, whatever is changed meanwhile
    panels = measure(sizes)
    about["hardware"] += f", numba threads: {numba.get_num_threads()}"
    if options.plot:
        draw(panels, options.plot, header_text(about))
    page = markdown(panels, about)
    if options.into:
        write_into(options.into, page)
    if options.json:
        sweeps = {label: [sweep.as_json() for sweep in own] for label, own in panels.items()}
        page = json.dumps({"sweeps": sweeps} | about, indent=2)
    print(page)


if __name__ == "__main__":
    main()
