"""What `python -m benchmarks` lists and runs, and what no benchmark times: a wrong kernel."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as cli
from benchmarks import growth, kernels
from ferret_flwr.projection.kernels import cpu, cpu_interleaved
from tests.projection.tensors import TRITON, device_of

SOURCES = {path.stem: path.read_text() for path in (cli.ROOT / "benchmarks").glob("*.py")}
PARTS = {"__main__", "simulate"}  # the list itself, and the process of a comparison's run


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    return cli.main()


def test_every_module_with_a_command_line_is_listed(monkeypatch, capsys) -> None:
    def has_main(source: str) -> bool:
        functions = {n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
        return "main" in functions and '__name__ == "__main__"' in source

    assert {name for name, source in SOURCES.items() if has_main(source)} - PARTS == set(
        cli.BENCHMARKS
    )
    assert run(monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in cli.BENCHMARKS:
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.split(maxsplit=1)[1] == SOURCES[name].split('"""')[1].splitlines()[0]


def test_one_runs_with_its_own_options(monkeypatch, capsys, one_thread) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.kernels")
    run(monkeypatch, "kernels", "--elements", "2000", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["elements"] == 2000 and figures["project_over_copy"] > 0
    assert figures["hardware"] and figures["commit"] and figures["seed"] == kernels.SEED
    assert figures["versions"]["numpy"] == np.__version__
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "kernel")
    assert stopped.value.code == 2 and "'kernels', 'kernels_cuda'" in capsys.readouterr().err


def test_all_keeps_what_each_printed_and_says_what_did_not_run(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    short = replace(cli.BENCHMARKS["kernels"], arguments=("--elements", "2000"))
    monkeypatch.setitem(cli.BENCHMARKS, "kernels", short)
    assert run(monkeypatch, "--output", tmp_path, "--all", "kernels", "curves") == 0
    page = (tmp_path / "kernels.txt").read_text()
    assert page.startswith("$ python -m benchmarks.kernels --elements 2000\n")
    for name in ("authors_over_ours", "hardware", "versions", "seed", "commit"):
        assert f"\n{name} " in page
    assert "skipped: it needs the folders of finished runs" in capsys.readouterr().out
    monkeypatch.setitem(cli.BENCHMARKS, "curves", cli.Benchmark())  # which lacks its arguments
    assert run(monkeypatch, "--output", tmp_path, "--all", "curves") == 1
    assert "FAILED" in capsys.readouterr().out


WRONG = {
    "projections": (cpu_interleaved, "project", lambda gamma: 1.001 * gamma),
    "projections on contiguous blocks": (cpu, "project", lambda gamma: 1.001 * gamma),
    "fingerprints": (cpu, "fingerprint", lambda total: total + 1),
}


@pytest.fixture
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(work: object) -> float:
        raise AssertionError("a wrong kernel was timed")

    monkeypatch.setattr(kernels, "seconds", timed)
    monkeypatch.setattr(growth, "seconds", timed)


def refused() -> None:
    for kind in (kernels.measure, kernels.slope, kernels.parts):
        with pytest.raises(SystemExit, match="not timed: the kernels disagree with the reference"):
            kind(2000, "float32")
    with pytest.raises(SystemExit, match="not timed"):
        growth.measure(growth.QUICK)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_not_timed(what: str, monkeypatch, nothing_is_timed, one_thread) -> None:
    module, name, change = WRONG[what]
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: change(right(*arguments)))
    refused()


@pytest.mark.parametrize("module", [cpu, cpu_interleaved])
def test_a_bit_is_enough(module, monkeypatch, nothing_is_timed, one_thread) -> None:
    def wrong(arrays: list, c: np.ndarray, segments, plan) -> None:
        right(arrays, c, segments, plan)
        arrays[-1].view(np.uint32)[-1] ^= 1

    right = module.subtract
    monkeypatch.setattr(module, "subtract", wrong)
    refused()


@pytest.mark.parametrize("triton", TRITON)
def test_a_wrong_kernel_for_gpus_is_not_timed(triton, monkeypatch) -> None:
    device = device_of(triton)
    from ferret_flwr.projection.kernels import cuda

    right = cuda.project
    monkeypatch.setattr(cuda, "project", lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(SystemExit, match=r"not timed: .* \(rademacher, torch.float32"):
        kernels.check_kernels(device, (300, 421))
