"""Flower's proxy of a node that lives in this process."""

from collections.abc import Callable

from flwr.client import Client
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
)
from flwr.server.client_proxy import ClientProxy


class InProcess(ClientProxy):
    """A node of this process: what it is sent goes to a real client, as Flower would call it."""

    def __init__(self, node: int, make_client: Callable[[int], Client]) -> None:
        super().__init__(cid=str(node))
        self.node = node
        self.make_client = make_client
        self.requests: list[FitIns | EvaluateIns] = []

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        return self.make_client(self.node).get_properties(ins)

    def get_parameters(
        self, ins: GetParametersIns, timeout: float | None, group_id: int | None
    ) -> GetParametersRes:
        return self.make_client(self.node).get_parameters(ins)

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        self.requests.append(ins)
        return self.make_client(self.node).fit(ins)

    def evaluate(
        self, ins: EvaluateIns, timeout: float | None, group_id: int | None
    ) -> EvaluateRes:
        self.requests.append(ins)
        return self.make_client(self.node).evaluate(ins)

    def reconnect(self, ins, timeout, group_id):  # type: ignore[no-untyped-def]
        raise NotImplementedError
