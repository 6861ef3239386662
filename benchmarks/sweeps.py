"""Seconds while one number grows, beside the line expected of them: as tables and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import finish, pyplot
from benchmarks.tables import seconds_text, table

Term = Callable[[float], float]
POINTS = 50  # of a line in the plot


def constant(x: float) -> float:
    """Return 1, the term of what does not depend on x."""
    return 1.0


def linear(x: float) -> float:
    """Return x, the term of what grows in step with it."""
    return x


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Attributes
    ----------
    name
        What is done.
    law
        What is expected, in words.
    terms
        The same as functions of x, one or two, each up to a factor.
    """

    name: str
    law: str
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Curve:
    """Measured seconds, and the line that they are expected on.

    The line of one term has half of the points above, that of two goes through the first and the
    last.

    Attributes
    ----------
    work
        What took them.
    x
        The number that grew, ascending.
    seconds
        Of each x.
    """

    work: Work
    x: Sequence[int]
    seconds: Sequence[float]

    def expected(self, x: Sequence[float]) -> np.ndarray:
        """Return the line's seconds at each of ``x``."""
        terms = self.work.terms
        values = np.array([[term(point) for term in terms] for point in self.x])
        if len(terms) == 1:
            factors = np.median(np.array(self.seconds) / values[:, 0], keepdims=True)
        else:
            ends = [0, -1]
            factors = np.linalg.lstsq(values[ends], np.array(self.seconds)[ends])[0]
        return np.array([[term(point) for term in terms] for point in x]) @ factors

    @property
    def slopes(self) -> tuple[float, float]:
        """Return the power of x that suits the measured and the expected seconds best."""
        both = self.seconds, self.expected(self.x)
        measured, expected = (np.polyfit(np.log(self.x), np.log(y), 1)[0] for y in both)
        return float(measured), float(expected)


@dataclass(frozen=True)
class Sweep:
    """Kinds of work whose seconds were measured while one number grew.

    Attributes
    ----------
    title
        What else is the same.
    varied
        The number that grew.
    curves
        All with the same x.
    beside
        Further columns: a number for each x.
    unit
        What x is multiplied by in the plot.
    """

    title: str
    varied: str
    curves: Sequence[Curve]
    beside: Mapping[str, Sequence[float]]
    unit: int = 1

    @classmethod
    def of(
        cls,
        title: str,
        varied: str,
        works: Sequence[Work],
        rows: Mapping[int, Mapping[str, float]],
        unit: int = 1,
    ) -> Sweep:
        """Return the sweep of ``rows``: by x, the seconds of each work by name, and what else."""
        x = list(rows)

        def column(name: str) -> list[float]:
            return [float(row[name]) for row in rows.values()]

        names = [work.name for work in works]
        curves = [Curve(work, x, column(work.name)) for work in works]
        others = [name for name in next(iter(rows.values())) if name not in names]
        return cls(title, varied, curves, {name: column(name) for name in others}, unit)

    @property
    def x(self) -> Sequence[int]:
        """Return the values of the number that grew."""
        return self.curves[0].x

    def markdown(self) -> str:
        """Return the sweep as a table, with the ratio of each measured to its expected number."""
        head, columns = [self.varied], [[f"{x:,}" for x in self.x] + ["slope"]]
        for curve in self.curves:
            expected = curve.expected(curve.x)
            pairs = list(zip(curve.seconds, expected, strict=True))
            measured_slope, expected_slope = curve.slopes
            head += [f"{curve.work.name}, s", f"expected: {curve.work.law}"]
            columns.append([*map(seconds_text, curve.seconds), f"{measured_slope:.2f}"])
            columns.append(
                [f"{seconds_text(line)} ({y / line:.2f})" for y, line in pairs]
                + [f"{expected_slope:.2f}"]
            )
        for name, values in self.beside.items():
            head.append(name)
            columns.append([f"{value:.3g}" for value in values] + [""])
        return f"{self.title}\n\n{table(head, zip(*columns, strict=True))}"

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        curves = [
            {
                "work": curve.work.name,
                "law": curve.work.law,
                "seconds": list(curve.seconds),
                "expected": curve.expected(curve.x).tolist(),
                "slope": dict(zip(("measured", "expected"), curve.slopes, strict=True)),
            }
            for curve in self.curves
        ]
        return {
            "title": self.title,
            self.varied: list(self.x),
            "curves": curves,
            **{name: list(values) for name, values in self.beside.items()},
        }


def draw(panels: Mapping[str, Sequence[Sweep]], path: Path, note: str) -> None:
    """Draw sweeps in four panels, measured points and expected lines.

    Parameters
    ----------
    panels
        The sweeps of each by the label of its x.
    path
        A PNG or SVG file.
    note
        Stands below.
    """
    figure, axes = pyplot().subplots(2, 2, figsize=(13, 10))
    for axis, (label, sweeps) in zip(axes.flat, panels.items(), strict=True):
        for number, (sweep, curve) in enumerate((s, c) for s in sweeps for c in s.curves):
            style = {"color": f"C{number}"}
            x = np.geomspace(curve.x[0], curve.x[-1], POINTS)
            where = [sweep.unit * point for point in curve.x]
            name = f"{curve.work.name} ({curve.work.law})"
            axis.plot(where, curve.seconds, "o", label=name, **style)
            axis.plot(sweep.unit * x, curve.expected(x), "--", linewidth=1.2, **style)
        axis.set(xlabel=label, ylabel="seconds", xscale="log", yscale="log")
        axis.set_title("; ".join(sweep.title for sweep in sweeps), fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(title="dots: measured; dashes: expected", fontsize=8, title_fontsize=8)
    finish(figure, path, note)
