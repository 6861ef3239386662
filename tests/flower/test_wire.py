"""What is sent is what was meant, weighs what is said, and nothing else is understood."""

import json

import numpy as np
import pytest
from flwr.common import FitIns, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.serde import recorddict_to_proto
from flwr.compat.common.recorddict_compat import fitins_to_recorddict

from ferret_flwr.config import Config
from ferret_flwr.flower import wire
from ferret_flwr.ledger import Ledger, payload_nbytes
from tests.flower.conftest import Federation
from tests.flower.test_rounds_match import plain_loop


@pytest.fixture
def ledger(config: Config) -> Ledger:
    return plain_loop(config, rounds=2)


def test_request_round_trip(ledger: Ledger) -> None:
    plan = ledger.entries[-1].plan
    request = wire.Request.of(ledger, 1, plan)
    parameters, config = wire.encode(request)
    back = wire.decode(parameters_to_ndarrays(parameters), config)
    assert back.plan is not None
    assert (back.plan.round, back.plan.seed) == (plan.round, plan.seed)
    assert np.array_equal(back.plan.counts, plan.counts)
    assert ledger.until(1).append(back.entries[0]).head == ledger.head == back.head


def test_arrays_weigh_what_the_closed_form_says(ledger: Ledger) -> None:
    last = ledger.entries[-1]
    parameters, _ = wire.encode(wire.Request.of(ledger, 1, last.plan))
    arrays = parameters_to_ndarrays(parameters)
    assert sum(array.nbytes for array in arrays) == payload_nbytes(last.plan)


def test_requests_share_what_is_the_same_in_them(ledger: Ledger) -> None:
    plan = ledger.entries[-1].plan
    (all_of_it, _), (half, _) = (wire.encode(wire.Request.of(ledger, n, plan)) for n in (0, 1))
    assert len(all_of_it.tensors) == 5
    pairs = zip(all_of_it.tensors[:1] + all_of_it.tensors[3:], half.tensors, strict=True)
    assert all(one is other for one, other in pairs)


@pytest.mark.parametrize("missed", [0, 1, 2])
def test_message_nbytes_is_what_flower_serialises(missed: int, ledger: Ledger) -> None:
    request = wire.Request.of(ledger, len(ledger) - missed, ledger.entries[-1].plan)
    parameters, config = wire.encode(request)
    record = fitins_to_recorddict(FitIns(parameters, config), keep_input=True)
    exact = recorddict_to_proto(record).ByteSize()
    assert abs(wire.message_nbytes(parameters, config) - exact) <= 40 + 8 * len(parameters.tensors)


def test_a_byte_more_in_an_array_is_a_byte_more_on_the_wire() -> None:
    small, large = (ndarrays_to_parameters([np.zeros(n, dtype=np.uint8)]) for n in (1000, 1001))
    assert wire.message_nbytes(large, {}) == wire.message_nbytes(small, {}) + 1


def without(values, key):  # type: ignore[no-untyped-def]
    return {k: v for k, v in values.items() if k != key}


@pytest.mark.parametrize(("blocks", "most"), [(0, 34_000), (512, 50_000)])
def test_recipe_stays_below_50_kb_each_way(blocks: int, most: int) -> None:
    """A round of 8192 coefficients on 134,515,008 parameters, with most bases in few blocks."""
    from ferret_flwr.config import FerretConfig
    from ferret_flwr.ledger import Header
    from ferret_flwr.rounds import next_plan, publish

    ledger = Ledger(Header("0" * 16, 134_515_008, "1" * 16))
    generator = np.random.Generator(np.random.Philox(key=1))
    config = FerretConfig(blocks=blocks)
    for _ in range(3):
        plan = next_plan(ledger, config, seed=1)
        spread = np.exp(2 * generator.standard_normal(plan.num_coefficients))
        ledger = ledger.append(publish(plan, spread, 1.0))
    plan = next_plan(ledger, config, seed=1)
    assert (plan.counts.max() > 127) == bool(blocks)  # some counts need two bytes
    down = wire.message_nbytes(*wire.encode(wire.Request.of(ledger, 2, plan)))
    up = wire.message_nbytes(
        ndarrays_to_parameters([np.zeros(plan.num_coefficients, dtype=np.float32)]), {}
    )
    assert up < down <= most


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v | {"protocol": 99}, "the server speaks protocol 99"),
        (lambda v: {k: w for k, w in v.items() if k != "plan"}, "not valid"),
        (lambda v: v | {"header": {"layout": "x"}}, "not valid"),
        (lambda v: v | {"plan": v["plan"] | {"family": "cauchy"}}, "rademacher"),
        (lambda v: v | {"plan": without(v["plan"], "interleaved")}, "not valid"),
        (lambda v: v | {"plan": v["plan"] | {"interleaved": 10**9}}, "at most one for each"),
        (
            lambda v: v | {"plan": without(v["plan"], "interleaved") | {"block-size": 128_000}},
            "bases per block",
        ),
        (lambda v: v | {"entries": v["entries"] * 3}, "not valid"),
        (lambda v: [v], "not valid"),
    ],
)
def test_foreign_request_is_one_clear_error(edit, message: str, ledger: Ledger) -> None:  # type: ignore[no-untyped-def]
    parameters, config = wire.encode(wire.Request.of(ledger, 1, ledger.entries[-1].plan))
    changed = {wire.KEY: json.dumps(edit(json.loads(str(config[wire.KEY]))))}
    with pytest.raises(wire.ProtocolError, match=message):
        wire.decode(parameters_to_ndarrays(parameters), changed)


def test_request_of_another_strategy_is_named() -> None:
    with pytest.raises(wire.ProtocolError, match="must use the Ferret strategy"):
        wire.decode([], {})


def test_damaged_arrays_in_a_request_are_refused_and_change_nothing(
    federation: Federation,
) -> None:
    federation.run(federation.ferret(), 2)
    proxy = federation.proxies[0]
    last = proxy.requests[-1]
    arrays = parameters_to_ndarrays(last.parameters)
    arrays[2][0, 5] += 1.0  # a coefficient of round 1
    path = federation.folder / "run-1" / "node-0.safetensors"
    before = path.read_bytes()
    path.unlink()
    federation.run(federation.ferret(), 1)  # round 1 again, so that the node has no cache
    request = wire.decode(arrays, last.config)
    reply = federation.numpy_client(0).fit(arrays, dict(last.config))
    assert request.since == 0
    assert reply[0] == []
    assert "do not lead to the ledger" in str(reply[2]["error"])
    assert not path.exists() or path.read_bytes() == before


def test_parameters_are_never_unpickled() -> None:
    dangerous = np.array([object()], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        parameters_to_ndarrays(Parameters([_pickled(dangerous)], "numpy.ndarray"))


def _pickled(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()
