"""List the benchmarks, run one of them, or run all that can run here.

python -m benchmarks                        # the list
python -m benchmarks growth --quick         # as python -m benchmarks.growth --quick
python -m benchmarks --all                  # every one, to results/benchmarks
python -m benchmarks --all kernels growth   # these
"""

from __future__ import annotations

import argparse
import ast
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.header import ROOT
from benchmarks.tables import seconds_text

SMOLLM2 = ("models/SmolLM2-135M", "data/gsm8k-train.jsonl", "data/gsm8k-test.jsonl")


def no_gpu() -> str:
    """Return what `kernels_cuda` lacks here, "" if nothing."""
    import torch

    from ferret_flwr.projection.arrays import has_triton

    if not torch.cuda.is_available():
        return "a CUDA device"
    return "" if has_triton() else "Triton"


def no_meminfo() -> str:
    """Return what `growth` lacks here to know how much memory is free, "" if nothing."""
    path = Path("/proc/meminfo")
    return "" if path.exists() else str(path)


def no_smollm2() -> str:
    """Return which files of the recipe for SmolLM2 are not there, "" if all are."""
    return ", ".join(name for name in SMOLLM2 if not (ROOT / name).exists())


@dataclass(frozen=True)
class Benchmark:
    """How ``--all`` runs a benchmark.

    Attributes
    ----------
    arguments
        Of its command line; ``{folder}`` is where everything goes.
    missing
        Returns what it would need and is not here, "" if it can run.
    """

    arguments: tuple[str, ...] = ()
    missing: Callable[[], str] = str


BENCHMARKS = {
    "kernels": Benchmark(),
    "kernels_cuda": Benchmark(missing=no_gpu),
    "growth": Benchmark(("--plot", "{folder}/growth.png"), no_meminfo),
    "scale": Benchmark(("--plot", "{folder}/scale.png")),
    "message": Benchmark(),
    "overhead": Benchmark(("--recipe", "examples/gsm8k-smollm2.toml"), no_smollm2),
    "memory": Benchmark(),
    "privacy": Benchmark(("--output", "{folder}/privacy.png")),
    "leakage": Benchmark(),
    "one_round": Benchmark(
        ("--recipe", "examples/gsm8k-smollm2.toml", "--output", "{folder}/one-round"), no_smollm2
    ),
    "number_format": Benchmark(("--output", "{folder}/number-format")),
    "curves": Benchmark(missing=lambda: "the folders of finished runs"),
    "compare": Benchmark(("benchmarks/plans/builtin.toml", "--output", "{folder}/builtin")),
}


def summary(name: str) -> str:
    """Return the first line of a benchmark's docstring, without importing it."""
    source = (ROOT / "benchmarks" / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


def listing() -> str:
    """Return a line for each benchmark, and how to run them."""
    lines = [f"  {name:<14}{summary(name)}" for name in BENCHMARKS]
    return "\n".join(
        [
            "python -m benchmarks NAME ...    runs one; its options: NAME --help",
            "python -m benchmarks --all       runs all that can run here, see --help",
            "",
            *lines,
        ]
    )


def run_one(name: str, arguments: list[str]) -> None:
    """Run a benchmark in this process, as ``python -m benchmarks.NAME`` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


def run_here(name: str, folder: Path) -> str:
    """Run a benchmark in a process of its own, and return what became of it.

    What it prints goes to the screen, and without its progress to ``NAME.txt`` in ``folder``.
    """
    benchmark = BENCHMARKS[name]
    if missing := benchmark.missing():
        return f"skipped: it needs {missing}"
    arguments = [text.format(folder=folder) for text in benchmark.arguments]
    command = ["-m", f"benchmarks.{name}", *arguments]
    print(f"\n$ python {' '.join(command)}", flush=True)
    began = time.perf_counter()
    with (
        (folder / f"{name}.txt").open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, "-u", *command], cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8"
        ) as process,
    ):
        file.write(f"$ python {' '.join(command)}\n\n")
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
    took = f"{seconds_text(time.perf_counter() - began)} s"
    if process.returncode:
        return f"FAILED after {took} with status {process.returncode}"
    return f"done in {took}: {folder / f'{name}.txt'}"


def run_all(names: list[str], folder: Path) -> int:
    """Run benchmarks in turn, tell what became of each, and return 1 if one has failed."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = {name: run_here(name, folder) for name in names}
    print()
    for name, outcome in outcomes.items():
        print(f"{name:<14}{outcome}")
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--all",
        nargs="*",
        choices=BENCHMARKS,
        metavar="NAME",
        help="run these, or all, in turn, and keep what they print; the last, 'compare', takes "
        "longest",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/benchmarks"),
        metavar="FOLDER",
        help="of --all, default %(default)s",
    )
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, metavar="NAME", help="run this one")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="its own options"
    )
    options = parser.parse_args()
    if options.all is not None:
        return run_all(options.all or list(BENCHMARKS), options.output)
    if options.name:
        run_one(options.name, options.arguments)
    else:
        print(listing())
    return 0


if __name__ == "__main__":
    sys.exit(main())
