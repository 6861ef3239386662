"""Training with one gradient at a time: a tensor's step is taken as soon as its gradient is there.

The step is taken and told within the backward pass, piece by piece, on float32 copies of the
pieces. Neither the starting parameters nor a second gradient is ever held (LOMO, Lv et al., ACL
2024, does the step alike).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from ferret_flwr.config import TrainConfig
from ferret_flwr.projection.kernels.philox import derive_seed
from ferret_flwr.projection.kernels.rounding import rounded

from .errors import NonFiniteLossError
from .optimizers import make_optimizer
from .tensors import as_array

Applied = Callable[[int, torch.Tensor], None]  # (index in 0..d-1, w_before − w_after from there on)

PIECE = 2**20  # elements that are stepped at once; some four float32 copies of them are held
ROUNDING = 0x0B16  # tells the seeds of the rounding from those of the rounds' bases
ELEMENTWISE = (  # optimizers to which a part of a tensor is a tensor
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)


class LeanSteps:
    """The optimizer steps of one client in one round, each within a backward pass.

    float32 parameters move as under one optimizer over all of them. bfloat16 ones are stepped in
    float32, which is what is told, and then rounded at random so that the mean is that step; such a
    step can be far smaller than the distance of two bfloat16 numbers.

    Parameters
    ----------
    parameters
        All that are trained, in layout order: float32 or bfloat16.
    config
        The optimizer and ``max_grad_norm``, which costs a second backward pass.
    applied
        Is told the exact float32 step of each piece.
    seed
        Of the random bits of the rounding, which depend on nothing else but the step and the index.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        config: TrainConfig,
        applied: Applied,
        seed: int,
    ) -> None:
        """Make one optimizer a tensor."""
        self.parameters = list(parameters)
        self.config = config
        self.applied = applied
        self.seed = seed
        self._starts = [0, *itertools.accumulate(p.numel() for p in self.parameters)]
        whole = config.optimizer not in ELEMENTWISE
        self._largest = [max(1, p.numel()) if whole else PIECE for p in self.parameters]
        self._held: list[list[torch.nn.Parameter]] = []  # a piece each, empty between its steps
        self._optimizers = []
        for parameter, largest in zip(self.parameters, self._largest, strict=True):
            pieces = torch.zeros_like(parameter, dtype=torch.float32).reshape(-1).split(largest)
            held = [torch.nn.Parameter(piece.view(_shape(parameter, pieces))) for piece in pieces]
            self._optimizers.append(make_optimizer(held, config))
            for piece in held:
                piece.data = piece.data.new_empty(0)
            self._held.append(held)

    def take(self, loss: torch.Tensor, number: int, rate: float) -> None:
        """Go back through the graph of ``loss`` and step each tensor on the way.

        Parameters
        ----------
        loss
            A scalar; its graph is freed.
        number
            Of the step in the round, from 0.
        rate
            The learning rate.

        Raises
        ------
        NonFiniteLossError
            If the loss, or the norm of all gradients, is not finite: nothing has changed then.
            Without ``max_grad_norm`` a tensor's gradient is looked at when it is there, and
            the tensors before it have been stepped.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLossError(f"the loss is {value}; the step was not applied")
        scale = 1.0
        if self.config.max_grad_norm:
            norm = self._norm(loss)
            if not math.isfinite(norm):
                raise NonFiniteLossError(
                    f"the loss is {value} and the gradient norm {norm}; the step was not applied"
                )
            scale = clip_factor(norm, self.config.max_grad_norm)

        def step(tensor: int, gradient: torch.Tensor) -> None:
            if not self.config.max_grad_norm and not math.isfinite(norm := float(_norm(gradient))):
                raise NonFiniteLossError(
                    f"the loss is {value} and a tensor's gradient norm {norm}; the step was not "
                    "applied to it"
                )
            self._step(tensor, gradient, scale, number, rate)

        with gradients_passed_to(step, self.parameters):
            loss.backward()

    def _norm(self, loss: torch.Tensor) -> float:
        """Return the norm of all gradients by a backward pass of its own."""
        norms: dict[int, torch.Tensor] = {}

        def keep(tensor: int, gradient: torch.Tensor) -> None:
            norms[tensor] = _norm(gradient)

        with gradients_passed_to(keep, self.parameters):
            loss.backward(retain_graph=True)
        device = self.parameters[0].device  # of the result; a model may be spread over several
        found = torch.stack([norms[i].to(device) for i in sorted(norms)])
        return float(torch.linalg.vector_norm(found))

    @torch.no_grad()
    def _step(
        self, tensor: int, gradient: torch.Tensor, scale: float, number: int, rate: float
    ) -> None:
        parameter, optimizer = self.parameters[tensor], self._optimizers[tensor]
        for group in optimizer.param_groups:
            group["lr"] = rate
        weights = parameter.detach().reshape(-1)  # a copy if the parameter is not contiguous
        pieces, largest = self._held[tensor], self._largest[tensor]
        shape, start = _shape(parameter, pieces), self._starts[tensor]
        slopes = gradient.reshape(-1).split(largest)
        for held, old, slope in zip(pieces, weights.split(largest), slopes, strict=True):
            held.data = old.to(torch.float32, copy=True).view(shape)
            held.grad = slope.to(torch.float32).mul_(scale).view(shape)
            optimizer.step()
            held.grad = None
            new = held.data.view(-1)
            held.data = new.new_empty(0)
            self.applied(start, old - new)
            old.copy_(new if old.dtype == torch.float32 else self._rounded(new, number, start))
            start += old.numel()
        if not parameter.is_contiguous():
            parameter.copy_(weights.view_as(parameter))

    def _rounded(self, values: torch.Tensor, number: int, start: int) -> torch.Tensor:
        bits = rounded(as_array(values), self.seed, number, start)
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


@contextmanager
def gradients_passed_to(
    act: Callable[[int, torch.Tensor], None], parameters: Sequence[torch.nn.Parameter]
) -> Iterator[None]:
    """Hand each gradient to ``act`` with its tensor's number once it is whole, and drop it.

    It is whole when every use of the tensor has been gone back through, so tied weights come once,
    and when it is, nothing in the graph needs the weights any more.
    """

    def hook(tensor: int, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        act(tensor, gradient)

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(hook, tensor))
        for tensor, parameter in enumerate(parameters)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None


def rounding_seed(seed: int, round: int, partition_id: int) -> int:
    """Return the seed of a client's rounding in one round; no basis is drawn from it."""
    return derive_seed(seed, ROUNDING, round, partition_id)


def clip_factor(norm: float, largest: float) -> float:
    """Return what `torch.nn.utils.clip_grads_with_norm_` multiplies gradients with."""
    return float(torch.clamp(largest / (torch.tensor(norm) + 1e-6), max=1.0))


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm in float32 whatever the type."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _shape(parameter: torch.Tensor, pieces: Sequence[torch.Tensor]) -> Sequence[int]:
    """Return the shape of a piece: the tensor's, if it is one piece."""
    return parameter.shape if len(pieces) == 1 else (-1,)
