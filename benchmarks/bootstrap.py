"""Intervals by clustered bootstrap: `python benchmarks/bootstrap.py [--out benchmarks/results/bootstrap.json]`.

Compared, on 10,000 values in 50, 1,000 and 10,000 clusters, 1,000 resamples of their mean:
  ours     `vlm_repro.metrics.statistics.clustered_interval`
  plain    for each resample, draw the clusters, put their values together, take the mean
Both draw the same clusters, so both bounds must agree to 1e-12 before anything is timed. A third way, `macro`, is ours for the mean over nine group means, which the papers' tables use.
"""
from collections.abc import Callable

from bench import arguments, finish, hot_spots, interleaved, least, now, one_thread, require, versions

one_thread()

import numpy as np  # noqa: E402

from vlm_repro.metrics.statistics import Interval, by_group, clustered_interval, expanded_percentiles, macro_mean  # noqa: E402

TOLERANCE = 1e-12


def sample(n: int, n_clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values that differ between clusters, the cluster of each, and one of nine groups."""
    rng = np.random.default_rng(n_clusters)
    code = np.sort(np.concatenate([np.arange(n_clusters), rng.integers(0, n_clusters, n - n_clusters)]))
    values = rng.normal(size=n_clusters)[code] + rng.normal(size=n)
    return values, np.array([f"c{i:05}" for i in code]), np.array([f"g{i % 9}" for i in range(n)])


def plain(values: np.ndarray, clusters: np.ndarray, n_resamples: int) -> Interval:
    """One resample at a time."""
    names, code = np.unique(clusters, return_inverse=True)
    members, g, rng = [np.flatnonzero(code == c) for c in range(len(names))], len(names), np.random.default_rng(0)
    draws = []
    for _ in range(n_resamples):
        drawn = rng.integers(0, g, g)
        draws.append(values[np.concatenate([members[c] for c in drawn])].mean())
    lo, hi = np.quantile(draws, expanded_percentiles(g))
    return Interval(float(values.mean()), float(lo), float(hi), len(values), g)


def ways_of(n: int, n_clusters: int, n_resamples: int) -> dict[str, Callable[[], Interval]]:
    values, clusters, groups = sample(n, n_clusters)
    return {"ours": lambda: clustered_interval(values, clusters, n_resamples=n_resamples), "plain": lambda: plain(values, clusters, n_resamples),
            "macro": lambda: clustered_interval(by_group(values, groups), clusters, macro_mean, n_resamples)}


def compare(ways: dict[str, Callable[[], Interval]]) -> float:
    """How far the bounds of both ways are apart."""
    ours, other = ways["ours"](), ways["plain"]()
    apart = max(abs(ours.value - other.value), abs(ours.lo - other.lo), abs(ours.hi - other.hi))
    require(ours.hi > ours.lo and apart <= TOLERANCE, f"{ours} and {other} are {apart:.1e} apart")
    return apart


def main() -> None:
    options, begun = arguments("Time intervals by clustered bootstrap.").parse_args(), now()
    n, n_resamples, counts = (500, 40, (20, 500)) if options.quick else (10_000, 1_000, (50, 1_000, 10_000))
    cases = {g: ways_of(n, g, n_resamples) for g in counts}
    equal = {str(g): compare(ways) for g, ways in cases.items()}
    rounds = {str(g): interleaved(ways, options.rounds, f"{g} clusters") for g, ways in cases.items()}
    slowest = max(least(r, way) for r in rounds.values() for way in ("ours", "macro"))
    figures = {"slowest_s": slowest, "against_plain": min(least(r, "plain") / least(r, "ours") for r in rounds.values())}
    finish("C10", options, begun, figures, lambda: hot_spots(cases[counts[-1]]["macro"]), versions=versions("numpy"), sizes={"values": n, "resamples": n_resamples, "clusters": list(counts)},
           equal={"bounds_apart": equal, "tolerance": TOLERANCE}, rounds=rounds)


if __name__ == "__main__":
    main()
