"""What a plugged-in run does with odd nodes, odd servers, owners who insist, and lost files."""

import json

import flwr.server.strategy as legacy
import flwr.serverapp.strategy as of_messages
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.client.mod import fixedclipping_mod

from ferret_flwr.config import ConfigError, FerretConfig
from ferret_flwr.flower import Ferret
from ferret_flwr.flower.mods import on_coefficients
from ferret_flwr.ledger import Ledger, LedgerError

from .conftest import (
    Nodes,
    ferret_mod,
    legacy_fedavg,
    message_app,
    message_fedavg,
    numpy_app,
    run_legacy,
    run_messages,
    start_arrays,
)

CONFIG = FerretConfig(coefficients=64)


def spoiling(edit, node=2):
    """Return a mod before Ferret's that spoils what one node sends."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_id == node and reply.has_content():
            edit(reply.content)
        return reply

    return mod


def say(**told):
    """Return an edit of what a node says of itself."""

    def edit(content):
        name = "ferret" if "ferret" in content else "fitres.metrics"
        if name not in content:
            name = "evaluateres.metrics"
        record = content[name]
        record["ferret"] = json.dumps(json.loads(record["ferret"]) | told)

    return edit


def say_deeply(content):
    name = "ferret" if "ferret" in content else "fitres.metrics"
    if name in content:
        content[name]["ferret"] = "[" * 100_000


def run_with(api, mods, folder, rounds=2, **more):
    app, strategy, run = api
    ferret = Ferret(strategy(**more), CONFIG)
    run(ferret, Nodes(app(mods=mods), folder), rounds)
    return ferret


@pytest.mark.parametrize(
    "edit",
    [
        say_deeply,
        say(still=[[1]]),
        say(still="all"),
        say(**{"partition-id": -1}),
        say(fingerprint="0" * 16),
        say(round=99),
        say(cached=10**30),
        say(**{"time/local_s": 10**400}),
    ],
)
def test_nothing_that_a_node_says_ends_the_run(edit, api, tmp_path):
    ferret = run_with(api, [spoiling(edit), ferret_mod], tmp_path, fraction_evaluate=0.0)
    assert len(ferret.ledger) == 2
    assert all(name.startswith("node 2") for name in ferret.refused)


def one_metric_more(content):
    if "metrics" in content:
        content["metrics"]["other"] = 1.0


def no_metrics(content):
    content.pop("metrics", None)


def no_finite_loss(content):
    if "metrics" in content:
        content["metrics"]["seen"] = float("nan")


def no_examples(content):
    if "metrics" in content:
        content["metrics"]["num-examples"] = 0


def arrays_twice(content):
    if "arrays" in content:
        content["again"] = content["arrays"]


@pytest.mark.parametrize(
    "edit", [one_metric_more, no_metrics, no_finite_loss, no_examples, arrays_twice]
)
def test_records_of_another_shape_are_named(edit, tmp_path):
    """Flower's own FedAvg would end the run."""
    api = message_app, message_fedavg, run_messages
    app, strategy, run = api
    ferret = Ferret(strategy(fraction_evaluate=0.0), CONFIG)
    nodes = Nodes(app(mods=[spoiling(edit, node=3), ferret_mod]), tmp_path, 3)
    run(ferret, nodes, 2)
    assert len(ferret.ledger) == 2
    assert [name.split(" (")[0] for name in ferret.refused] == ["node 3"]


def test_evaluations_of_another_shape_are_named(tmp_path):
    def spoil(content):
        if "arrays" not in content and "metrics" in content:
            content["metrics"]["loss"] = float("nan")

    nodes = Nodes(message_app(mods=[spoiling(spoil, node=3), ferret_mod]), tmp_path, 3)
    ferret = Ferret(message_fedavg(), CONFIG)
    _, result = run_messages(ferret, nodes, 2)
    assert all(np.isfinite(m["loss"]) for m in result.evaluate_metrics_clientapp.values())
    (reason,) = ferret.refused.values()
    assert "not finite" in reason


def test_a_request_cannot_name_a_file(tmp_path):
    """Its fingerprints become the name of a file, which a node removes if it is no base."""
    precious = tmp_path / "model-00001-of-00002.safetensors"
    precious.write_bytes(b"weights")
    nodes = Nodes(message_app(), tmp_path)
    ferret = Ferret(message_fedavg(fraction_evaluate=0.0), CONFIG)
    sent = []
    ask = nodes.send_and_receive
    nodes.send_and_receive = lambda messages, timeout=None: ask(sent.extend(messages) or sent)
    run_messages(ferret, nodes, 1)
    request = sent[0]
    text = json.loads(request.content["ferret"]["ferret"])
    text["header"] |= {"base": str(tmp_path / "model-00001-of"), "layout": "00002"}
    content = RecordDict(dict(request.content))
    content["ferret"] = ConfigRecord({"ferret": json.dumps(text)})
    forged = Message(content, dst_node_id=1, message_type="train")
    (reply,) = ask([forged])
    said = json.loads(reply.content["ferret"]["ferret"])
    assert "there is no such base model" in said["error"]
    assert precious.read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"privacy.mechanism": "local"}, "this app's client adds no noise"),
        ({"privacy.secure-aggregation": True}, "this app's client adds no noise"),
        ({"ferret.coefficients": 8}, "asks for K = 95 coefficients, this node gives at most 39"),
        ({"ferret.coeficients": 8}, "did you mean 'ferret.coefficients'"),
    ],
)
def test_what_the_owner_of_a_node_insists_on(own, reason, api, tmp_path):
    app, strategy, run = api
    nodes = Nodes(app(), tmp_path)
    given = nodes.context

    def context(node):
        context = given(node)
        if node == 2:
            context.node_config.update(own)
        return context

    nodes.context = context
    ferret = Ferret(strategy(fraction_evaluate=0.0), CONFIG)
    run(ferret, nodes, 1)
    (said,) = ferret.refused.values()
    assert reason in said
    assert len(ferret.ledger) == 1


def test_noise_reaches_what_is_published_and_nothing_else_is_said(tmp_path):
    """Which tensors stand still would tell who trains what, without noise."""
    wrapped = legacy.DifferentialPrivacyServerSideFixedClipping(
        legacy_fedavg(fraction_evaluate=0.0), 5.0, 1.0, 2
    )
    ferret = Ferret(wrapped, CONFIG)
    arrays, _ = run_legacy(ferret, Nodes(numpy_app(), tmp_path), 1)
    entry = ferret.ledger.entries[0]
    assert entry.still == ()
    spread = entry.coefficients.std()
    assert 1.2 < spread < 4  # of 5 x 1 / 2 and of an update of length 1
    assert (arrays[4] != start_arrays()["frozen"]).any()


def test_noise_of_the_node_hides_what_stands_still(tmp_path):
    wrapped = legacy.DifferentialPrivacyClientSideFixedClipping(
        legacy_fedavg(fraction_evaluate=0.0), 5.0, 1.0, 2
    )
    sent = []

    def watch(message, context, call_next):
        reply = call_next(message, context)
        if "fitres.metrics" in reply.content:
            sent.append(json.loads(reply.content["fitres.metrics"]["ferret"]))
        return reply

    mods = [watch, on_coefficients(fixedclipping_mod), ferret_mod]
    ferret = Ferret(wrapped, CONFIG)
    run_legacy(ferret, Nodes(numpy_app(mods=mods), tmp_path), 1)
    assert len(ferret.ledger) == 1 and not ferret.refused
    assert not any("still" in said for said in sent)


AROUND = {
    "legacy": (legacy, legacy_fedavg, numpy_app, run_legacy),
    "message": (of_messages, message_fedavg, message_app, run_messages),
}


@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("side", ["Server", "Client"])
def test_flowers_wrappers_around_ferret_publish_nothing(side, kind, tmp_path):
    module, strategy, app, run = AROUND[kind]
    wrapper = getattr(module, f"DifferentialPrivacy{side}SideFixedClipping")
    ferret = Ferret(strategy(), CONFIG)
    with pytest.raises(Exception) as raised:
        run(wrapper(ferret, 1.0, 1.0, 2), Nodes(app(), tmp_path), 1)
    assert not ferret.ledger, raised


def test_a_node_that_loses_its_files_evaluates_all_the_same(tmp_path):
    """A request to evaluate cannot be asked again: the next one brings what was lacking."""
    nodes = Nodes(message_app(), tmp_path)
    ferret = Ferret(message_fedavg(), CONFIG)
    run_messages(ferret, nodes, 1)
    for path in nodes.cache(1).rglob("*.safetensors"):
        path.unlink()
    refused = []
    for _ in range(2):
        asked = ferret.configure_evaluate(2, ArrayRecord({}), ConfigRecord({}), nodes)
        ferret.aggregate_evaluate(2, nodes.send_and_receive(asked))
        refused.append(list(ferret.refused))
    assert [len(names) for names in refused] == [1, 0]


def test_another_start_needs_another_ferret(tmp_path):
    ferret = Ferret(message_fedavg(fraction_evaluate=0.0), CONFIG)
    nodes = Nodes(message_app(), tmp_path)
    run_messages(ferret, nodes, 1)
    others = {name: array * 0 for name, array in start_arrays().items()}
    record = ArrayRecord({n: Array(np.asarray(a)) for n, a in others.items()})
    with pytest.raises(ConfigError, match="make a new one for each run"):
        ferret.start(nodes, record, num_rounds=1)


def test_a_run_whose_nodes_told_the_start_is_resumed(tmp_path):
    path = tmp_path / "run.ledger"
    first = Ferret(legacy_fedavg(start=False), CONFIG, ledger_path=path)
    run_legacy(first, Nodes(numpy_app(), tmp_path), 1)
    second = Ferret(legacy_fedavg(start=False), CONFIG, ledger=Ledger.load(path))
    run_legacy(second, Nodes(numpy_app(), tmp_path), 1)
    assert len(second.ledger) == 2 and not second.refused


def test_nodes_that_cannot_tell_the_start_are_named(tmp_path):
    nodes = Nodes(numpy_app(), tmp_path)
    from .conftest import NumPyApp

    class Silent(NumPyApp):
        get_parameters = NumPyApp.__mro__[1].get_parameters

    from flwr.clientapp import ClientApp

    nodes.app = ClientApp(client_fn=lambda context: Silent(0, None).to_client(), mods=[ferret_mod])
    ferret = Ferret(legacy_fedavg(start=False), CONFIG)
    with pytest.raises(LedgerError, match="give the strategy inside Ferret its initial_parameters"):
        run_legacy(ferret, nodes, 1)
    assert ferret.ledger is None


def test_a_rate_that_decays_knows_the_length_of_the_run(tmp_path):
    config = FerretConfig(coefficients=64, rate_schedule="linear")
    ferret = Ferret(message_fedavg(fraction_evaluate=0.0), config)
    run_messages(ferret, Nodes(message_app(), tmp_path), 4)
    assert [entry.rate for entry in ferret.ledger.entries] == [1.0, 0.75, 0.5, 0.25]


def test_a_query_of_the_apps_own_reaches_it(tmp_path):
    asked = []

    def app(message, context, call_next):
        asked.append(message.metadata.message_type)
        return call_next(message, context)

    nodes = Nodes(numpy_app(mods=[ferret_mod, app]), tmp_path)
    content = RecordDict({"getpropertiesins.config": ConfigRecord({"ask": "gpu"})})
    nodes._answer(Message(content, dst_node_id=1, message_type="get_properties"))
    assert asked == ["get_properties"]


def test_metrics_are_no_secret():
    """`MetricRecord` holds numbers alone, so what a node says must be elsewhere."""
    with pytest.raises(TypeError):
        MetricRecord({"ferret": "{}"})
