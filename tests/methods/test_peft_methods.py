"""The methods that tune an adapter: one FedIT round by hand, and real runs of all."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ferret_flwr.config import ModelConfig, parse
from ferret_flwr.flower.comparison import MethodClient
from ferret_flwr.flower.serverapp import Run
from ferret_flwr.methods.method import Reply
from ferret_flwr.methods.registry import METHODS
from ferret_flwr.training.models import load_model
from ferret_flwr.training.stream import example_stream
from ferret_flwr.training.worker import Node, Worker
from tests.flower.in_process import InProcess

NAMES = ["fedit", "fedit-sgd", "fedprompt", "fedptuning"]
RANK, ALPHA, RATE, STEPS, BATCH, EPS = 4, 6.0, 0.02, 3, 4, 1e-3
SETTINGS = {
    "dataset.max-examples": 61,
    "train.learning-rate": RATE,
    "train.steps": STEPS,
    "train.batch-size": 2,
    "train.gradient-accumulation": 2,
    "train.max-grad-norm": 0.0,
    "adapter.rank": RANK,
    "adapter.alpha": ALPHA,
}
WEIGHTS = 30, 10
ROUND = 2
# Two layers, A and B of q_proj and v_proj, and the payload of each method with 6 virtual tokens
HIDDEN, ENCODER, VIRTUAL = 64, 32, 6
LORA = 2 * 2 * 2 * RANK * HIDDEN
MLP = HIDDEN * ENCODER + ENCODER + ENCODER * ENCODER + ENCODER + ENCODER * HIDDEN + HIDDEN
SIZES = {
    "fedit": LORA,
    "fedit-sgd": LORA,
    "fedprompt": VIRTUAL * HIDDEN,
    "fedptuning": VIRTUAL * HIDDEN + MLP,
}
RATES = {"fedit": 0.01, "fedit-sgd": 1.0, "fedprompt": 0.03, "fedptuning": 0.003}


def setup(name, **changes):
    kind = METHODS[name]
    config = kind.configured(parse(SETTINGS | {"method": name} | changes))
    nodes = [Node.of(config, i, 2, kind.adapter) for i in range(2)]
    server = kind(config, Worker(config.model, kind.adapter, config.adapter))
    server.start()
    return server, [(kind(config, node.worker), node) for node in nodes]


def answer(client, state, node, round):
    client.load(state)
    return client.local_round(state, node, round)


def one_round(server, clients):
    """Return the replies of a round, and what the server makes of them."""
    replies = [
        Reply(answer(client, server.state(), node, ROUND)[0], weight, node.partition_id)
        for (client, node), weight in zip(clients, WEIGHTS, strict=True)
    ]
    server.aggregate(ROUND, replies)
    return replies, server.state()


# One round of FedIT, by hand


class HandLora(torch.nn.Module):
    """W x + (alpha / r) B A x, on tensors that are nobody's parameters."""

    def __init__(self, weight, a, b, scale):
        super().__init__()
        self.tensors = weight, a, b
        self.scale = scale

    def forward(self, x):
        weight, a, b = self.tensors
        return F.linear(x, weight) + self.scale * F.linear(F.linear(x, a), b)


def train_by_hand(state, node, *, scale=ALPHA / RANK, adam=True):
    """Return A and B of the layers in order after a node's round."""
    model = load_model(ModelConfig()).model.requires_grad_(False)
    factors = [torch.from_numpy(array.copy()).requires_grad_() for array in state]
    left = iter(factors)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            setattr(layer.self_attn, name, HandLora(weight, next(left), next(left), scale))
    assert next(left, None) is None
    stream = example_stream(
        node.examples, node.worker.lm.tokenizer, 64, "error", seed=42,
        partition_id=node.partition_id, start=(ROUND - 1) * STEPS * BATCH,
    )  # fmt: skip
    first = [torch.zeros_like(p) for p in factors]
    second = [torch.zeros_like(p) for p in factors]
    for step in range(1, STEPS + 1):
        total, count = 0.0, 0
        for tokens, _ in islice(stream, BATCH):  # one by one, without padding
            logp = model(torch.tensor([tokens.input_ids])).logits[0].log_softmax(-1)
            for t in range(len(tokens.prompt), len(tokens.input_ids)):
                total = total - logp[t - 1, tokens.input_ids[t]]
                count += 1
        gradients = torch.autograd.grad(total / count, factors)
        with torch.no_grad():
            for p, g, m, v in zip(factors, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                moments = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + EPS)
                p.sub_(RATE * (moments if adam else g))
    return [p.detach().double().numpy() for p in factors]


def mean(results, weights=WEIGHTS):
    return [
        sum(w * array for w, array in zip(weights, arrays, strict=True)) / sum(weights)
        for arrays in zip(*results, strict=True)
    ]


def matches(arrays, expected, start):
    """Tell whether ``arrays`` are ``expected`` but for float32 sums in another order."""
    return all(
        np.abs(a - e).max() <= 1e-3 * np.abs(e - s).max()
        for a, e, s in zip(arrays, expected, start, strict=True)
    )


@pytest.mark.parametrize("name", ["fedit", "fedit-sgd"])
def test_a_round_is_the_one_by_hand(name):
    adam = name == "fedit"
    arguments = {"train.optimizer-args": f"eps={EPS}"} if adam else {}
    server, clients = setup(name, **arguments)
    for array in server.state():  # B is 0 in a fresh adapter, and its scale does not show
        array += 0.05 * np.random.default_rng(array.size).standard_normal(array.shape)
    start = [array.copy() for array in server.state()]
    replies, state = one_round(server, clients)

    by_hand = [train_by_hand(start, node, adam=adam) for _, node in clients]
    assert matches(replies[0].arrays, by_hand[0], start)
    assert matches(state, mean(by_hand), start)
    assert {array.dtype for array in state} == {np.dtype(np.float32)}

    assert not matches(state, mean(by_hand, (1, 1)), start)
    assert not matches(replies[0].arrays, by_hand[1], start)
    node = clients[0][1]
    assert not matches(replies[0].arrays, train_by_hand(start, node, adam=not adam), start)
    assert not matches(replies[0].arrays, train_by_hand(start, node, adam=adam, scale=1.0), start)


@pytest.mark.parametrize("name", NAMES)
def test_a_round_sends_the_adapter_and_leaves_the_base_alone(name):
    changes = {"adapter.virtual-tokens": VIRTUAL, "adapter.encoder-size": ENCODER}
    server, clients = setup(name, **changes)
    start = [array.copy() for array in server.state()]
    replies, state = one_round(server, clients)
    server.load(state)
    for arrays in (start, state, *(reply.arrays for reply in replies)):
        assert sum(array.nbytes for array in arrays) == 4 * SIZES[name]
    assert all((a != b).any() for a, b in zip(start, state, strict=True))
    base = load_model(ModelConfig()).model.state_dict()
    for worker in (server.worker, clients[0][1].worker):
        frozen = {n: p for n, p in worker.lm.model.named_parameters() if not p.requires_grad}
        assert len(frozen) == len(base) - 1  # the head is the embeddings
        for frozen_name, parameter in frozen.items():
            own = f".{frozen_name.replace('base_layer.', '')}"
            (key,) = [key for key in base if own.endswith(f".{key}")]
            assert torch.equal(parameter, base[key]), frozen_name


@pytest.mark.parametrize("name", NAMES)
def test_rounds_begin_at_the_state_whoever_trained_last(name):
    server, clients = setup(name, **{"train.steps": 1})
    (client, node), (other, neighbour) = clients
    assert node.worker is neighbour.worker  # as in a process that serves many nodes
    first, _ = answer(client, server.state(), node, 1)
    answer(other, server.state(), neighbour, 1)
    again, _ = answer(client, server.state(), node, 1)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


def test_a_reply_that_is_not_finite_is_not_sent():
    server, ((client, node), _) = setup("fedit")
    broken = [np.full_like(array, 1e30) for array in server.state()]
    with pytest.raises((FloatingPointError, ValueError), match="not finite|loss is"):
        answer(client, broken, node, 1)


# What the methods decide


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("asked", ["SGD", "AdamW"])
def test_only_the_optimizer_is_decided(name, asked):
    config = parse({"train.optimizer": asked, "train.learning-rate": 0.5, "adapter.rank": 3})
    configured = METHODS[name].configured(config)
    assert configured.train.optimizer == ("SGD" if name == "fedit-sgd" else "Adam")
    assert replace(configured, train=config.train) == config
    assert replace(configured.train, optimizer=asked) == config.train


# As a user runs them


@pytest.mark.parametrize("name", NAMES)
def test_a_run(name, tmp_path):
    settings = {
        "method": name,
        "train.learning-rate": RATES[name],
        "num-server-rounds": 2,
        "results-dir": str(tmp_path),
        "train.steps": 8,
        "train.batch-size": 8,
        "evaluate.max-examples": 16,
        "evaluate.generate-examples": 4,
        "evaluate.max-new-tokens": 8,
        "adapter.rank": RANK,
        "adapter.virtual-tokens": VIRTUAL,
        "adapter.encoder-size": ENCODER,
    }
    run = Run(parse(settings))
    kind = METHODS[name]
    config = kind.configured(parse(settings))

    def client(node):
        member = Node.of(config, node, 2, kind.adapter)
        return MethodClient(kind(config, member.worker), member).to_client()

    server = run.components().server
    server.set_max_workers(1)  # the nodes share one model
    for node in range(2):
        server.client_manager().register(InProcess(node, client))
    server.fit(2, timeout=None)

    before, first, second = run.rows
    assert second["train/loss"] < first["train/loss"]
    assert second["eval/loss"] < before["eval/loss"]
    assert all(0 <= row["eval/rougeL"] <= 100 for row in run.rows)
    assert not first["failures"] and not second["failures"]
    for way in ("uplink", "downlink"):
        # besides the numbers, some hundred bytes for each array's header
        overhead = second[f"comm/{way}_bytes_per_node"] - 4 * SIZES[name]
        assert 0 < overhead < 4000
    names = {file.name for file in (run.folder / "final").iterdir()}
    assert ("config.json" if "fedit" in name else "adapter_config.json") in names
    assert "tokenizer.json" in names
