"""Choosing an option for each of several knobs whose costs add up: the way from the least error to the fewest bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """An option for each knob, and what it adds to everything exact: bytes and squared error."""

    chosen: tuple[int, ...]
    size: float
    square: float

    @classmethod
    def of(cls, chosen: tuple[int, ...], points: Sequence[Sequence[tuple[float, float]]]) -> Mixture:
        """The sums over all knobs."""
        terms = [options[index] for options, index in zip(points, chosen, strict=True)]
        return cls(chosen=chosen, size=sum(t[0] for t in terms), square=sum(t[1] for t in terms))


def descend(knobs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[int, ...]]:
    """The way from the least error to the fewest bytes, for knobs with options (bytes, squared error) that add up.

    Every mixture on it has the least error of all mixtures with no more bytes: the steps go along each knob's lower
    convex hull and are taken in the order of their slopes, so each mixture minimises error + price * bytes at some
    price. Mixtures between two of them, off the hull, are not visited.

    Example:
        >>> descend([[(0, 0), (-8, 1), (-9, 9)], [(0, 0), (-4, 2)]])
        [(0, 0), (1, 0), (1, 1), (2, 1)]
    """
    at = [min(range(len(options)), key=lambda i: (options[i][1], options[i][0])) for options in knobs]
    steps: list[tuple[float, int, int]] = []
    for number, options in enumerate(knobs):
        here, last = at[number], 0.0
        while True:
            size, square = options[here]
            slopes = {
                i: (other - square) / (size - fewer)
                for i, (fewer, other) in enumerate(options)
                if fewer < size and math.isfinite(other)
            }
            if not slopes:
                break
            here = min(slopes, key=lambda i: (slopes[i], options[i][0]))
            last = max(last, slopes[here])  # rounding must not turn two steps around
            steps.append((last, number, here))
    way = [tuple(at)]
    for _, number, option in sorted(steps, key=lambda step: step[0]):
        at[number] = option
        way.append(tuple(at))
    return way


def thin(way: Sequence[Mixture], count: int) -> list[Mixture]:
    """At most `count` mixtures, about evenly spaced in bytes, the first and the last among them."""
    if len(way) <= count:
        return list(way)
    first, last = way[0].size, way[-1].size
    wanted = [first + (last - first) * i / (count - 1) for i in range(count)]
    return [way[i] for i in sorted({min(range(len(way)), key=lambda i: abs(way[i].size - w)) for w in wanted})]
