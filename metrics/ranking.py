"""Ranking by several measures at once."""

from collections.abc import Sequence


def pareto_ranks(points: Sequence[Sequence[float]]) -> list[int]:
    """The number of the Pareto front of each point, from 1. Smaller is better in every measure.

    A point dominates another if it is as good in all measures and better in one. Front 1 holds the points that no
    other dominates, front 2 those that only front 1 dominates, and so on (Esser et al. 2024, §5.1).
    """
    ranks = [0] * len(points)
    left = set(range(len(points)))
    for front in range(1, len(points) + 1):
        best = {i for i in left if not any(_dominates(points[j], points[i]) for j in left)}
        for i in best:
            ranks[i] = front
        left -= best
    return ranks


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))
