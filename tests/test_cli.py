"""The command line, on a ledger of two real rounds of the built-in model."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ferret_flwr.cli import main
from ferret_flwr.config import ModelConfig, parse
from ferret_flwr.ledger import Header, Ledger
from ferret_flwr.methods.ferret import local_round
from ferret_flwr.projection.allocation import ALLOCATIONS
from ferret_flwr.projection.layout import Blocks, Layout
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import next_plan, publish, server_rate
from ferret_flwr.training.forecast import PROBE_TEXT, gradient_energies
from ferret_flwr.training.models import load_model
from ferret_flwr.training.saving import save_model
from ferret_flwr.training.tensors import masters_of, trainable_parameters
from ferret_flwr.training.worker import Node, Worker

ROUNDS, SIZE = 2, 110_400
CONTIGUOUS = ["-k", "64", "--blocks", "32", "--allocation", "energy"]
CONFIG = parse(
    {
        "num-server-rounds": ROUNDS,
        "dataset.max-examples": 60,
        "train.steps": 2,
        "train.learning-rate": 0.1,
        "train.gradient-accumulation": 1,
        "train.seq-length": 128,
        "ferret.coefficients": 64,
        "ferret.blocks": 32,
        "ferret.warmup-rate": 1.0,
    }
)


pytestmark = pytest.mark.usefixtures("one_thread_a_module")


@pytest.fixture(scope="module")
def trained():
    """Return a ledger of real rounds, and the parameters that it leads to."""
    worker = Worker(CONFIG.model)
    examples = Node.of(CONFIG, 0, 2).examples
    node = Node(worker, examples, examples, CONFIG, 0)
    replica = worker.follower.from_base()
    ledger = Ledger(replica.header)
    for round in range(1, ROUNDS + 1):
        plan = next_plan(ledger, CONFIG.ferret, CONFIG.seed)
        update, _ = local_round(replica, worker.parameters, plan, lambda: node.train(round))  # noqa: B023
        rate = server_rate(CONFIG.ferret, plan, ledger, ROUNDS)
        ledger = ledger.append(publish(plan, update.coefficients, rate))
        replica.follow(ledger)
        ledger = ledger.with_fingerprint(replica.fingerprint)
    return ledger, replica


@pytest.fixture
def ledger(trained, tmp_path):
    """Return a file with the ledger."""
    path = tmp_path / "run.ledger"
    trained[0].save(path)
    return path


def call(capsys, *arguments):
    """Return what a command that must succeed prints."""
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def error_of(capsys, *arguments):
    """Return the one line that a command which must fail prints to stderr."""
    status = main([str(a) for a in arguments])
    _, err = capsys.readouterr()
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("ferret-flwr: error: ")]
    assert err.endswith(line + "\n")
    return line


def row(out, name):
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    return line


def test_info(capsys):
    out = call(capsys, "info")
    for name in ("ferret-flwr", "flwr", "torch", "numpy", "processors", "CUDA device"):
        row(out, name + " ")
    assert row(out, "numpy").split()[1] == np.__version__
    assert "reference: live; cpu (numba): live" in row(out, "kernels")


def test_plan(capsys):
    out = call(capsys, "plan", "--model", "builtin:tiny", "-k", "64")
    assert "K = 64 (rademacher)" in row(out, "coefficients")
    assert row(out, "blocks").endswith("L = 64 interleaved, one basis each")
    assert "256 B a round; FedAvg 442 kB, 1,725 times as much" in row(out, "a node sends")
    assert "256 B a round" in row(out, "a node receives")
    assert f"cos {(64 / SIZE) ** 0.5:.4f} ≈ √(K/d), whatever the update" in row(out, "fidelity")
    assert float(row(out, "projection").split()[1]) >= 0


def test_plan_with_more_coefficients_than_parameters(capsys):
    out = call(capsys, "plan", "--model", "builtin:tiny", "-k", str(SIZE + 1))
    assert "K = 110,400 (rademacher)" in row(out, "coefficients")
    assert "cos 1.0000" in row(out, "fidelity")


def test_plan_with_contiguous_blocks(capsys):
    out = call(capsys, "plan", "--model", "builtin:tiny", *CONTIGUOUS)
    assert "110,400 trainable parameters in 20 tensors" in row(out, "model")
    assert "K = 64 (rademacher)" in row(out, "coefficients")
    assert "L = 32 of 3,456 parameters" in row(out, "blocks")
    assert "256 B a round; FedAvg 442 kB, 1,725 times as much" in row(out, "a node sends")
    assert "320 B a round" in row(out, "a node receives")  # K numbers and a byte a block, twice
    assert f"cos {(64 / SIZE) ** 0.5:.4f}" in row(out, "fidelity")
    assert "one gradient of this model" in out
    first, later = _cosines(out)
    assert 0 < first < later < 1


def _cosines(out):
    """Return the predicted fidelities in round 1 and after it."""
    found = re.search(r"cos ([\d.]+) in round 1 \(uniform\), ([\d.]+) after", out)
    return tuple(map(float, found.groups()))


def test_plan_with_the_energies_of_a_run(capsys, ledger):
    arguments = ["plan", "--model", "builtin:tiny", *CONTIGUOUS]
    out = call(capsys, *arguments, "--ledger", ledger)
    assert f"the ledger '{ledger}'" in out
    first, later = _cosines(out)
    assert 0 < first < later < 1
    without = call(capsys, *arguments)
    assert _cosines(without) != (first, later)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_plan_with_every_allocation(capsys, monkeypatch, allocation):
    # The timings are not looked at, so the sample may be small.
    monkeypatch.setattr("ferret_flwr.training.forecast.SAMPLE_ELEMENTS", 2**16)
    options = ["--blocks", "8", "--allocation", allocation, "--family", "truncated-normal"]
    out = call(capsys, "plan", "--model", "builtin:tiny", "-k", "80", *options)
    blocks = row(out, "blocks")
    assert "L = 8 of" in blocks and blocks.endswith(f"({allocation})")
    assert ("bases per block 10 to 10" in blocks) == (allocation == "uniform")


@pytest.mark.parametrize("count", [1, 7, 32, 800])
def test_the_energies_of_a_plan_are_a_gradients(count):
    lm = load_model(CONFIG.model)
    parameters = trainable_parameters(lm.model)
    layout, blocks = Layout.of(parameters), Blocks.of(SIZE, count)
    energies = gradient_energies(lm, layout, blocks)
    assert all(p.grad is None for p in parameters.values())

    tokens = lm.tokenizer(PROBE_TEXT, return_tensors="pt").input_ids
    lm.model(input_ids=tokens, labels=tokens).loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in parameters.values()]).double().numpy()
    expected = np.add.reduceat(gradient**2, np.arange(0, SIZE, blocks.block_size))
    np.testing.assert_allclose(energies, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-k", "0"], "at least one element and one block"),
        (["--blocks", "-1"], "at least one element and one block"),
        (["--blocks", "9", "-k", "5"], "'ferret.blocks' must be at most"),
        (["--allocation", "norm"], "'ferret.allocation' = 'norm' is for contiguous blocks"),
        (["--max-per-block", "9"], "'ferret.max-per-block' = 9 is for contiguous blocks"),
        (["--ledger", "any"], "--ledger tells energies of contiguous blocks"),
    ],
)
def test_plan_refuses(capsys, options, message):
    assert message in error_of(capsys, "plan", "--model", "builtin:tiny", *options)


def test_plan_refuses_a_ledger_of_another_model(capsys, tmp_path):
    Ledger(Header("another", 300, "base")).save(tmp_path / "other.ledger")
    options = [*CONTIGUOUS, "--ledger", tmp_path / "other.ledger"]
    arguments = ["plan", "--model", "builtin:tiny", *options]
    assert "'builtin:tiny' has another number of parameters: 110400" in error_of(capsys, *arguments)


def test_plan_refuses_a_ledger_with_other_blocks(capsys, tmp_path, trained, ledger):
    arguments = ["plan", "--model", "builtin:tiny", "--ledger"]
    line = error_of(capsys, *arguments, ledger, "-k", "128", "--blocks", "8")
    assert f"'{ledger}' says nothing about 8 blocks, it has 32:" in line
    trained[0].until(0).save(tmp_path / "empty")
    line = error_of(capsys, *arguments, tmp_path / "empty", "-k", "64", "--blocks", "32")
    assert "says nothing about 32 blocks, it has none:" in line
    call(capsys, *arguments, ledger, "-k", "128", "--blocks", "32")


def test_show(capsys, ledger, trained):
    out = call(capsys, "ledger", "show", ledger)
    assert trained[0].head in row(out, "head")
    assert trained[0].header.base in row(out, "base model")
    assert f"{SIZE:,}" in row(out, "parameters")
    rounds = [line.split() for line in out.splitlines()[-ROUNDS:]]
    for cells, entry in zip(rounds, trained[0].entries, strict=True):
        most = str(entry.plan.counts.max())
        expected = [str(entry.round), "rademacher", "1", "32", "64", most, "1", entry.fingerprint]
        assert cells == expected


def test_show_an_unknown_fingerprint(capsys, tmp_path, trained):
    trained[0].with_fingerprint("").save(tmp_path / "file")
    out = call(capsys, "ledger", "show", tmp_path / "file")
    assert out.splitlines()[-1].endswith("(not known)")


def test_show_an_empty_ledger(capsys, tmp_path):
    Ledger(Header("layout", 10, "base")).save(tmp_path / "file")
    assert "in 0 rounds" in call(capsys, "ledger", "show", tmp_path / "file")


def test_verify(capsys, ledger, trained):
    out = call(capsys, "ledger", "verify", ledger, "--base", "builtin:tiny")
    *rounds, last = out.splitlines()
    assert rounds == [f"round {e.round}: {e.fingerprint}" for e in trained[0].entries]
    assert last == "verified: 2 rounds, 2 of them with a fingerprint to compare"


def test_verify_finds_another_model_at_the_end(capsys, tmp_path, trained):
    trained[0].with_fingerprint("0" * 16).save(tmp_path / "file")
    line = error_of(capsys, "ledger", "verify", tmp_path / "file", "--base", "builtin:tiny")
    assert "round 2" in line and "0" * 16 in line and trained[1].fingerprint in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_apply_writes_the_replicas_model(capsys, tmp_path, dtype, trained):
    # A ledger of a bfloat16 base is its own: m_0 is float32(w_0), and w_0 is rounded.
    config = ModelConfig(dtype=dtype)
    parameters = trainable_parameters(load_model(config).model)
    replica = Replica(Worker(config).layout, masters_of(parameters))
    entries = tuple(replace(entry, fingerprint="") for entry in trained[0].entries)
    ledger = Ledger(replica.header, entries)
    ledger.save(tmp_path / "ledger")
    replica.follow(ledger)
    if dtype == "float32":
        assert replica.fingerprint == trained[1].fingerprint

    arguments = ["--base", "builtin:tiny", "--dtype", dtype, "--output", tmp_path / "a" / "model"]
    out = call(capsys, "ledger", "apply", tmp_path / "ledger", *arguments)
    assert out.endswith(f"written to {tmp_path / 'a' / 'model'}\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model", dtype="auto")
    saved = trainable_parameters(model)
    assert list(saved) == list(parameters)
    for array, (name, p) in zip(replica.arrays, saved.items(), strict=True):
        assert torch.equal(p, torch.from_numpy(array).to(getattr(torch, dtype))), name
        assert p.dtype == parameters[name].dtype
    assert not all(torch.equal(p, parameters[name]) for name, p in saved.items())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "ledger"]


def _damaged(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _emptied(path):
    path.write_bytes(b"")


def _text(path):
    path.write_text("round = 1\n")


@pytest.mark.parametrize("damage", [_damaged, _cut, _emptied, _text])
@pytest.mark.parametrize("action", ["show", "verify", "apply", "plan"])
def test_a_damaged_ledger_is_named(capsys, ledger, tmp_path, action, damage):
    damage(ledger)
    arguments = {
        "show": ["ledger", "show", ledger],
        "verify": ["ledger", "verify", ledger, "--base", "builtin:tiny"],
        "apply": ["ledger", "apply", ledger, "--base", "builtin:tiny", "--output", tmp_path / "x"],
        "plan": ["plan", "--model", "builtin:tiny", *CONTIGUOUS, "--ledger", ledger],
    }[action]
    assert f"'{ledger}' is not a valid ledger" in error_of(capsys, *arguments)
    assert not (tmp_path / "x").exists()


def test_a_missing_ledger_is_named(capsys, tmp_path):
    line = error_of(capsys, "ledger", "show", tmp_path / "none")
    assert f"'{tmp_path / 'none'}': No such file" in line


@pytest.mark.parametrize("action", ["verify", "apply"])
def test_another_base_model_is_named(capsys, ledger, tmp_path, action):
    lm = load_model(ModelConfig())
    with torch.no_grad():
        lm.model.model.norm.weight[0] += 0.125
    base = save_model(lm, tmp_path / "other-base")
    output = ["--output", tmp_path / "x"] if action == "apply" else []
    line = error_of(capsys, "ledger", action, ledger, "--base", base, *output)
    assert f"'{base}' has another base model" in line
    assert not (tmp_path / "x").exists()


def test_another_dtype_is_another_base_model(capsys, ledger):
    arguments = ["ledger", "verify", ledger, "--base", "builtin:tiny", "--dtype", "float16"]
    assert "'builtin:tiny' has another base model" in error_of(capsys, *arguments)


def test_an_unknown_built_in_is_named(capsys, ledger, tmp_path):
    for arguments in (
        ["plan", "--model", "builtin:huge"],
        ["ledger", "verify", ledger, "--base", "builtin:huge"],
        ["ledger", "apply", ledger, "--base", "builtin:huge", "--output", tmp_path / "x"],
    ):
        line = error_of(capsys, *arguments)
        assert "'builtin:huge'" in line and "builtin:tiny" in line


def test_an_output_that_exists_is_left_alone(capsys, ledger, tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "precious").write_text("keep")
    arguments = ["ledger", "apply", ledger, "--base", "builtin:tiny", "--output", output]
    assert f"'{output}' exists already" in error_of(capsys, *arguments)
    assert [entry.name for entry in output.iterdir()] == ["precious"]


def test_an_output_that_cannot_be(capsys, ledger):
    output = ledger / "below-a-file"
    arguments = ["ledger", "apply", ledger, "--base", "builtin:tiny", "--output", output]
    assert str(ledger) in error_of(capsys, *arguments)


@pytest.mark.parametrize("arguments", [[], ["ledger"], ["plan"], ["ledger", "apply", "f"], ["x"]])
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ferret-flwr")


def test_the_module_runs_and_its_status_is_mains(tmp_path):
    command = [sys.executable, "-m", "ferret_flwr.cli", "ledger", "show", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "none" in result.stderr
