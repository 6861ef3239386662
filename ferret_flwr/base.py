"""The arrays that another app calls its model: which are tuned, and which stay as they are.

Ferret's own app knows a model by its trainable tensors. An app that only plugs Ferret in hands over
a list of arrays of any kind. Those of floating point are tuned: matrices and whatever has more
dimensions are projected, and vectors travel exactly if ``exact_vectors`` says so. They are few and
hold what noise would harm most: the running statistics of batch normalisation, scales, biases.
Integers and booleans, such as counters, stay what they are at the start.

Matrices that are equal at the start are tied weights, which a state dict names twice: they are
tuned once. Two copies would get two different reconstructions, of which the model keeps one; the
next update would then hold the difference, and its noise would grow from round to round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ferret_flwr.files import write_atomic
from ferret_flwr.ledger import Header
from ferret_flwr.projection.layout import Layout
from ferret_flwr.projection.projection import fingerprint

TUNED = ("float16", "float32", "float64")
FIXED_KINDS = "biu"  # NumPy's kinds: booleans, integers


class BaseError(ValueError):
    """Arrays cannot be tuned, or are not those of the base."""


@dataclass(frozen=True, eq=False)
class Base:
    """What a run starts from, as the app's own code sees it.

    Attributes
    ----------
    names, arrays
        In the app's order.
    exact_vectors
        Whether arrays of at most one dimension are sent as they are instead of projected.
    tie_equal
        Whether matrices that are equal are taken for tied weights.
    """

    names: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]
    exact_vectors: bool = True
    tie_equal: bool = True

    def __post_init__(self) -> None:
        """Refuse what could not be tuned."""
        for name, array in zip(self.names, self.arrays, strict=True):
            if array.dtype.name not in TUNED and array.dtype.kind not in FIXED_KINDS:
                raise BaseError(
                    f"array '{name}' is of {array.dtype}: Ferret tunes {', '.join(TUNED)} and "
                    "leaves integers and booleans as they are"
                )
            with np.errstate(over="ignore"):  # what overflows float32 is not finite there
                finite = _is_fixed(array) or np.isfinite(array.astype(np.float32)).all()
            if not finite:
                raise BaseError(f"array '{name}' has elements that are not finite in float32")
        if all(_is_fixed(array) for array in self.arrays):
            raise BaseError(
                f"none of the {len(self.arrays)} arrays is of {', '.join(TUNED)}: there is "
                "nothing to tune"
            )

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Positions of the tuned arrays in the order of `layout`."""
        free = [
            i for i, array in enumerate(self.arrays) if not _is_fixed(array) and i not in self.twins
        ]
        return tuple(sorted(free, key=lambda i: self._is_exact(i)))

    @cached_property
    def twins(self) -> dict[int, int]:
        """Position of each array that is tied -> of the one that is tuned in its place."""
        first: dict[tuple[object, ...], int] = {}
        twins = {}
        for i, array in enumerate(self.arrays):
            if not self.tie_equal or array.ndim < 2 or _is_constant(array):
                continue  # vectors and constants may well be equal by chance
            content = hashlib.sha256(np.ascontiguousarray(array).data).digest()
            same = first.setdefault((array.dtype, array.shape, content), i)
            if same != i:
                twins[i] = same
        return twins

    @cached_property
    def layout(self) -> Layout:
        """The tuned arrays, the exact ones last; none is exact if all are vectors."""
        exact = sum(self._is_exact(i) for i in self.order)
        return Layout(
            tuple(self.names[i] for i in self.order),
            tuple(self.arrays[i].shape for i in self.order),
            exact if exact < len(self.order) else 0,
            self._digest(),
        )

    def _digest(self) -> str:
        """Return what tells the base from others whose float32 parameters are the same."""
        kinds = [(array.dtype.str, array.shape) for array in self.arrays]
        digest = hashlib.sha256(json.dumps([self.about(), kinds]).encode())
        for array in self.arrays:
            if _is_fixed(array) or array.dtype == np.float64:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Return the size of all arrays, which FedAvg sends each way and round."""
        return sum(array.nbytes for array in self.arrays)

    def masters(self) -> list[np.ndarray]:
        """Return m_0: new float32 arrays in layout order."""
        return [np.array(self.arrays[i], dtype=np.float32, order="C") for i in self.order]

    def at(self, masters: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the app's arrays, in its order and dtypes, for parameters ``masters``."""
        arrays = list(self.arrays)
        for i, master in zip(self.order, masters, strict=True):
            arrays[i] = master.astype(self.arrays[i].dtype)
        for i, twin in self.twins.items():
            arrays[i] = arrays[twin]
        return arrays

    def tuned(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return those of the app's ``arrays`` that are tuned, in layout order, to be projected.

        Raises
        ------
        BaseError
            Naming the array that is missing, has another shape, or is not tied any more.
        """
        if len(arrays) != len(self.arrays):
            raise BaseError(f"the app returned {len(arrays)} arrays, it got {len(self.arrays)}")
        for name, base, array in zip(self.names, self.arrays, arrays, strict=True):
            if array.shape != base.shape:
                raise BaseError(
                    f"the app returned array '{name}' of shape {array.shape}, it got {base.shape}"
                )
        for i, twin in self.twins.items():
            if not np.array_equal(arrays[i], arrays[twin], equal_nan=True):
                raise BaseError(
                    f"arrays '{self.names[twin]}' and '{self.names[i]}' were equal at the start "
                    "and are not after training: if they are not tied weights, give Ferret "
                    "tie_equal=False"
                )
        return [_projectable(arrays[i], self.arrays[i].dtype) for i in self.order]

    def fits(self, header: Header) -> bool:
        """Return whether this is the base that ``header`` names."""
        same = (header.layout, header.size) == (self.layout.fingerprint, self.layout.size)
        return same and header.base == fingerprint(self.masters(), self.layout)

    def about(self) -> dict[str, Any]:
        """Return what is to be known beside the arrays, as JSON values."""
        return {
            "names": self.names,
            "exact-vectors": self.exact_vectors,
            "tie-equal": self.tie_equal,
        }

    @classmethod
    def of(cls, about: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> Base:
        """Return the base that `about` and its arrays describe."""
        return cls(tuple(about["names"]), tuple(arrays), about["exact-vectors"], about["tie-equal"])

    def save(self, path: Path) -> None:
        """Write everything to ``path``, whole or not at all."""
        text = json.dumps(self.about())
        tensors = {str(i): np.asarray(array, order="C") for i, array in enumerate(self.arrays)}
        write_atomic(path, save(tensors, metadata={"base": text}))

    @classmethod
    def load(cls, path: Path) -> Base:
        """Read what `save` wrote.

        Raises
        ------
        BaseError
            If the file is not there or not whole.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads(file.metadata()["base"])
                count = len(about["names"])
                return cls.of(about, [file.get_tensor(str(i)) for i in range(count)])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BaseError(f"'{path}' holds no base model: {error}") from error

    def _is_exact(self, i: int) -> bool:
        return self.exact_vectors and self.arrays[i].ndim <= 1


def _is_fixed(array: np.ndarray) -> bool:
    return array.dtype.kind in FIXED_KINDS or not array.size


def _is_constant(array: np.ndarray) -> bool:
    return not array.size or bool((array == array.flat[0]).all())


def _projectable(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return ``array`` as the base's dtype, and that as one that can be projected."""
    array = np.asarray(array, dtype=dtype)
    return array.astype(np.float32) if dtype == np.float64 else array
