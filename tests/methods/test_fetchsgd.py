"""FetchSGD: the count sketch, and rounds against Algorithm 1 written out in plain NumPy."""

import math

import numba
import numpy as np
import pytest
import torch

from ferret_flwr.config import parse
from ferret_flwr.methods.count_sketch import TILE, CountSketch
from ferret_flwr.methods.fetchsgd import FetchSGD
from ferret_flwr.methods.method import Reply
from ferret_flwr.projection import projection
from ferret_flwr.projection.kernels.philox import philox4x32
from ferret_flwr.projection.kernels.reference import basis_elements, block_of
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.training import worker as workers
from ferret_flwr.training.data import collate
from ferret_flwr.training.local import negative_log_likelihood
from ferret_flwr.training.models import load_model
from ferret_flwr.training.tensors import masters_of, trainable_parameters
from ferret_flwr.training.worker import Node

SIZES = [1, TILE - 1, TILE, TILE + 1, 5003]
ROUNDS = 6
CONFIG = parse(
    {
        "method": "fetchsgd",
        "num-server-rounds": ROUNDS,
        "dataset.max-examples": 60,
        "train.steps": 2,
        "train.batch-size": 4,
        "train.seq-length": 128,
        "train.schedule": "linear",
        "sketch.rows": 3,
        "sketch.columns": 5000,
        "sketch.top-k": 700,
    }
)


def drawn(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def placed(seed, rows, columns, size):
    """Return the column and the sign of every element in every row, ``(rows, size)`` each."""
    i = np.arange(size)
    where, signs = [], []
    for row in range(rows):
        counter = i // 1024 * 256 + i % 256
        words = philox4x32(np.stack([counter, 0 * i, row + 0 * i, 0xC5 + 0 * i], axis=1), (seed, 0))
        word = words[i, i // 256 % 4].astype(np.int64)
        where.append(word // 2 * columns // 2**31)
        signs.append(np.where(word % 2, -1.0, 1.0))
    return np.array(where), np.array(signs)


def dense_sketch(x, where, signs, columns):
    """Return the float64 table of ``x``."""
    rows = [np.bincount(w, s * x, columns) for w, s in zip(where, signs, strict=True)]
    return np.array(rows)


def dense_estimates(table, where, signs):
    rows = [t[w] * s for t, w, s in zip(table, where, signs, strict=True)]
    return np.median(rows, axis=0)


# The sketch


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 7), (5, 300)])
def test_a_sketch_is_what_its_definition_says(size, rows, columns):
    x = drawn(size)
    sketch = CountSketch(rows, columns, seed=11)
    where, signs = placed(11, rows, columns, size)
    cut = size // 3
    table = sketch.sketch([x[:cut], x[cut:]])
    assert table.dtype == np.float32 and table.shape == (rows, columns)
    np.testing.assert_array_equal(table, dense_sketch(x, where, signs, columns).astype(np.float32))
    np.testing.assert_array_equal(table, sketch.sketch_sparse(np.arange(size), x))
    assert size == 1 or (table != CountSketch(rows, columns, 12).sketch([x])).any()

    estimates = sketch.estimate(table, cut, size)
    expected = dense_estimates(table.astype(np.float64), where, signs)[cut:]
    np.testing.assert_allclose(estimates, expected, rtol=2e-7)


def test_columns_and_signs_are_uniform_and_independent():
    where, signs = placed(3, 2, 8, 40_000)
    for row in range(2):
        cells = np.bincount(2 * where[row] + (signs[row] > 0), minlength=16)
        assert (np.abs(cells - 2500) <= 5 * 50).all()
    pairs = np.bincount(8 * where[0] + where[1], minlength=64)
    assert (np.abs(pairs - 625) <= 5 * 25).all()
    assert not (np.abs(np.bincount(9 * where[0], minlength=64) - 625) <= 5 * 25).all()


def test_a_sketch_is_linear():
    a, b = drawn(5003), drawn(5003, seed=1)
    sketch = CountSketch(5, 64, seed=1)
    both = sketch.sketch([0.5 * a - 2 * b])
    apart = 0.5 * sketch.sketch([a]) - 2 * sketch.sketch([b])
    tolerance = 2.0**-22 * 5003 / 64 * 10
    np.testing.assert_allclose(both, apart, rtol=0, atol=tolerance)
    assert np.abs(both - 0.9 * apart).max() > tolerance


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_estimates_are_unbiased_over_seeds(rows):
    x, columns, draws = drawn(60), 20, 3000

    def deviates(scale, other_seed=0):
        """Return the largest deviation of a mean estimate, in standard errors."""
        estimates = []
        for seed in range(draws):
            table = CountSketch(rows, columns, seed).sketch([x])
            estimates.append(CountSketch(rows, columns, seed + other_seed).estimate(table, 0, 60))
        estimates = scale * np.array(estimates)
        error = estimates.std(axis=0, ddof=1) / math.sqrt(draws)
        return np.abs((estimates.mean(axis=0) - x) / error).max()

    assert deviates(1.0) <= 5
    assert deviates(0.8) > 5
    assert deviates(1.0, other_seed=1) > 5


def test_an_estimate_of_one_row_has_the_variance_of_what_shares_its_column():
    x, columns, draws = drawn(200), 50, 3000
    errors = []
    for seed in range(draws):
        sketch = CountSketch(1, columns, seed)
        errors.append((sketch.estimate(sketch.sketch([x]), 0, 1)[0] - x[0]) ** 2)
    expected = float((x[1:] ** 2).sum()) / columns
    spread = np.std(errors) / math.sqrt(draws)
    assert abs(np.mean(errors) - expected) <= 5 * spread
    assert abs(np.mean(errors) - expected * (columns + 15) / columns) > 5 * spread


def test_heavy_hitters_are_found():
    x = 0.01 * drawn(20_000)
    heavy = np.array([0, 5, 777, 1024, 19_999])
    x[heavy] = [3, -4, 2, -2.5, 5]
    sketch = CountSketch(5, 500, seed=2)
    indices, values = sketch.top_k(sketch.sketch([x]), 5, x.size)
    np.testing.assert_array_equal(indices, heavy)
    assert np.abs(values - x[heavy]).max() <= 5 * 0.01 * math.sqrt(x.size / 500)
    wrong, _ = CountSketch(5, 500, seed=3).top_k(sketch.sketch([x]), 5, x.size)
    assert set(wrong) != set(heavy)


@pytest.mark.parametrize("k", [1, 40, 2000, 5003])
def test_top_k_is_exact_with_ties_in_favour_of_the_first(k):
    sketch = CountSketch(3, 50, seed=4)  # 100 elements to a column: ties everywhere
    table = sketch.sketch([drawn(5003)])
    estimates = sketch.estimate(table, 0, 5003)
    expected = np.sort(np.lexsort([np.arange(5003), -np.abs(estimates)])[:k])
    for block in (97, 2048, 2**20):
        indices, values = sketch.top_k(table, k, 5003, block)
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_array_equal(values, estimates[expected])
    backwards = np.sort(np.lexsort([-np.arange(5003), -np.abs(estimates)])[:k])
    assert k in (1, 5003) or (backwards != expected).any()


def test_threads_do_not_matter():
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba has one thread on this machine")
    x, sketch = drawn(50_000), CountSketch(5, 300, seed=1)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        table = sketch.sketch([x[:777], x[777:]])
        indices, values = sketch.top_k(table, 100, x.size)
        results.append((table.tobytes(), indices.tobytes(), values.tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_row_is_a_projection_with_one_basis_a_block(interleaved):
    """docs/method.md: K_l = 1 with signs is the count sketch whose hash is an element's block."""
    size, block = 1000, 128
    delta = drawn(size)
    blocks = InterleavedBlocks(size, 13) if interleaved else Blocks(size, block)
    counts = None if interleaved else np.ones(blocks.count, dtype=np.int64)
    plan = RoundPlan(1, 9, "rademacher", blocks, counts)
    layout = Layout(("w",), ((size,),))
    signs = basis_elements(plan, 0, 0, size).astype(np.float64)[None]
    columns = (block_of(plan, 0, size) if interleaved else np.arange(size) // block)[None]

    table = dense_sketch(delta, columns, signs, blocks.count)
    gamma = projection.project([delta], layout, plan)
    tolerance = 2.0**-23 * np.abs(delta).sum()
    np.testing.assert_allclose(gamma, table[0], rtol=0, atol=tolerance)
    (update,) = projection.reconstruct(gamma * plan.unbiased_scale(), layout, plan)
    np.testing.assert_allclose(
        update, dense_estimates(table, columns, signs), rtol=0, atol=tolerance
    )
    others = np.random.default_rng(0).permutation(columns[0])[None]
    other = dense_sketch(delta, others, signs, blocks.count)
    assert np.abs(gamma - other[0]).max() > tolerance


# The method


def nodes():
    return [Node.of(CONFIG, i, 2) for i in range(2)]


def server():
    method = FetchSGD(CONFIG, workers.worker(CONFIG.model))
    method.start()
    return method


def flat(arrays):
    return np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in arrays])


def replies_of(state, round):
    found = []
    for node in nodes():
        method = FetchSGD(CONFIG, node.worker)
        method.load(state)
        arrays, loss = method.local_round(state, node, round)
        found.append((Reply(arrays, 3 - node.partition_id, node.partition_id), loss))
    return found


def gradient(weights, node, round):
    """Return the clipped gradient and the loss at flat ``weights``, in one batch."""
    lm = load_model(CONFIG.model)
    start = 0
    with torch.no_grad():
        for p in trainable_parameters(lm.model).values():
            p.copy_(torch.from_numpy(weights[start : start + p.numel()]).view(p.shape))
            start += p.numel()
    examples = [tokens for batch, _ in node.batches(round) for tokens in batch]
    assert len(examples) == 8
    lm.model.train()
    batch = collate(examples, lm.tokenizer.pad_token_id, torch.device("cpu"))
    loss = negative_log_likelihood(lm.model, batch)[0].mean()
    loss.backward()
    g = flat(p.grad for p in trainable_parameters(lm.model).values())
    assert np.linalg.norm(g) > CONFIG.train.max_grad_norm
    return g / np.linalg.norm(g) * CONFIG.train.max_grad_norm, float(loss.detach())


def test_two_rounds_are_algorithm_1():
    method, settings = server(), CONFIG.sketch
    base = flat(masters_of(method.worker.parameters)).astype(np.float32)
    where, signs = placed(CONFIG.seed, settings.rows, settings.columns, base.size)
    momentum = error = np.zeros((settings.rows, settings.columns))
    difference = previous = np.zeros(base.size)
    for round in (1, 2):
        weights = (base - difference).astype(np.float32)
        tables = []
        for (reply, loss), node in zip(replies_of(method.state(), round), nodes(), strict=True):
            g, expected = gradient(weights, node, round)
            tables.append(dense_sketch(g, where, signs, settings.columns))
            assert loss == pytest.approx(expected, rel=1e-5)
            np.testing.assert_allclose(reply.arrays[0], tables[-1], rtol=0, atol=1e-5)
            assert np.abs(tables[-1]).max() > 1e-2
        method.aggregate(round, [reply for reply, _ in replies_of(method.state(), round)])

        rate = CONFIG.train.learning_rate * (ROUNDS - round + 1) / ROUNDS
        momentum = settings.momentum * momentum + (3 * tables[0] + 2 * tables[1]) / 5
        error = rate * momentum + error
        estimates = dense_estimates(error, where, signs)
        indices, values = method.state()
        assert indices.dtype == np.int32 and (np.diff(indices) > 0).all()
        found = np.zeros(base.size)
        found[indices] = values
        # Of nearly equal estimates rounding decides which are taken: follow the method there.
        taken = found != previous
        assert taken.sum() == settings.top_k
        assert np.abs(estimates[taken]).min() >= np.abs(estimates[~taken]).max() - 1e-5
        delta = np.where(taken, estimates, 0)
        applied = dense_sketch(delta, where, signs, settings.columns) != 0
        error, momentum = np.where(applied, 0, error), np.where(applied, 0, momentum)
        difference = difference + delta
        np.testing.assert_allclose(method.momentum, momentum, rtol=0, atol=2e-5)
        np.testing.assert_allclose(method.error, error, rtol=0, atol=2e-5)
        np.testing.assert_allclose(found, difference, rtol=0, atol=2e-5)
        assert np.abs(found - 0.9 * difference).max() > 2e-5
        previous = found


def test_what_was_applied_is_forgotten_and_the_rest_kept():
    method, sketch = server(), CountSketch(3, 5000, CONFIG.seed)
    tables = [drawn(method.error.shape, seed=n) for n in (0, 1)]
    method.aggregate(1, [Reply([table], 1, n) for n, table in enumerate(tables)])
    applied = sketch.sketch_sparse(*method.state()) != 0
    assert 0 < applied.sum() <= 3 * CONFIG.sketch.top_k
    mean = np.mean(tables, axis=0)
    for table in (method.momentum, method.error):  # the first round's rate is 1
        assert not table[applied].any()
        np.testing.assert_allclose(table[~applied], mean[~applied], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_the_base_minus_the_state_wherever_it_was(dtype):
    model = parse({"model.dtype": dtype}).model
    worker = workers.Worker(model)
    base = [a.copy() for a in masters_of(worker.parameters)]
    method = FetchSGD(CONFIG, worker)

    def state(seed, count):
        indices = np.sort(np.random.default_rng(seed).permutation(worker.layout.size)[:count])
        return [indices.astype(np.int32), drawn(count, seed) / 10]

    def is_at(state):
        expected = flat(base).astype(np.float32)
        expected[state[0]] -= state[1]
        expected = torch.from_numpy(expected).to(getattr(torch, dtype)).float().numpy()
        return (
            flat(masters_of(worker.parameters)).astype(np.float32).tobytes() == expected.tobytes()
        )

    for seed, count in ((1, 500), (2, 90), (3, 0), (1, 500)):
        method.load(state(seed, count))
        assert is_at(state(seed, count))
        assert not is_at(state(seed + 1, count + 1))
    with torch.no_grad():
        next(iter(worker.parameters.values())).add_(1)  # somebody trains the same model
    method.load(state(2, 90))
    assert is_at(state(2, 90))


def test_the_servers_model_is_the_nodes():
    method = server()
    method.aggregate(1, [reply for reply, _ in replies_of(method.state(), 1)])
    method.load(method.state())
    here = flat(masters_of(method.worker.parameters))
    other = FetchSGD(CONFIG, workers.Worker(CONFIG.model))  # another process
    other.load(method.state())
    assert flat(masters_of(other.worker.parameters)).tobytes() == here.tobytes()
    other.load([method.indices[1:], method.values[1:]])
    assert flat(masters_of(other.worker.parameters)).tobytes() != here.tobytes()


def test_training_lowers_the_loss():
    method = server()
    losses = []
    for round in range(1, ROUNDS + 1):
        replies = replies_of(method.state(), round)
        losses.append(np.mean([loss for _, loss in replies]))
        method.aggregate(round, [reply for reply, _ in replies])
    assert losses[-1] < losses[0] - 0.5, losses


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda a: [a[:, :-1]], ValueError, r"partition 7 sent .*\(3, 4999\)"),
        (lambda a: [a.astype(np.float64)], ValueError, "partition 7 sent .*float64"),
        (lambda a: [a, a], ValueError, "partition 7 sent"),
        (lambda a: [], ValueError, "partition 7 sent"),
        (lambda a: [a * np.float32(np.nan)], FloatingPointError, "partition 7 is not finite"),
        (lambda a: [a + np.float32(np.inf)], FloatingPointError, "partition 7 is not finite"),
    ],
)
def test_a_bad_reply_is_refused(spoil, error, message):
    method = server()
    good = drawn(method.error.shape)
    method.check(Reply([good], 1, 3))
    with pytest.raises(error, match=message):
        method.check(Reply(spoil(good), 1, 7))


def test_a_gradient_that_is_not_finite_is_not_sent():
    node = nodes()[0]
    method = server()
    state = [np.array([5], dtype=np.int32), np.array([np.nan], dtype=np.float32)]
    method.load(state)
    with pytest.raises(FloatingPointError, match="round 1: .* partition 0 is not finite"):
        method.local_round(state, node, 1)
    assert all(p.grad is None for p in node.worker.parameters.values())
