"""The allocation against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from compressor.search.allocate import Factor, Floats, Problem, Site, least_cost, total_cost


def random_problem(seed: int, with_pairs: int = 0) -> Problem:
    """Four sites of two or three options, four factors over up to three of them, one overrule."""
    rng = np.random.default_rng(seed)
    counts = [int(rng.integers(2, 4)) for _ in range(4)]
    sites = tuple(Site(f"s{i}", (0.0, *rng.uniform(0.01, 1, n - 1))) for i, n in enumerate(counts))
    factors = []
    for _ in range(4):
        touched = tuple(int(s) for s in rng.choice(4, rng.integers(0, 4), replace=False))
        factors.append(Factor(touched, rng.uniform(0, 1, [counts[s] for s in touched])))
    pairs = [tuple(sorted(rng.choice(4, 2, replace=False).tolist())) for _ in range(with_pairs)]
    interactions = tuple(
        Factor((i, j), _beyond(rng.uniform(-0.2, 0.6, (counts[i], counts[j])))) for i, j in pairs
    )
    return Problem(sites, tuple(factors), overrules=((0, 1),), interactions=interactions)


def _beyond(table: Floats) -> Floats:
    """Of options that are left alone there is nothing beyond the sum."""
    table[0, :] = table[:, 0] = 0.0
    return table


def allowed(problem: Problem) -> Iterator[tuple[int, ...]]:
    """Every combination of options that no overrule forbids."""
    for options in itertools.product(*[range(len(site.damage)) for site in problem.sites]):
        if not any(options[i] and options[j] for i, j in problem.overrules):
            yield options


@pytest.mark.parametrize("seed", range(10))
def test_the_cheapest_is_the_cheapest_that_brute_force_finds(seed: int) -> None:
    problem = random_problem(seed)
    found = least_cost(problem)
    assert found is not None
    assert problem.cost(found) == pytest.approx(
        min(problem.cost(o) for o in allowed(problem)), rel=1e-3
    )


@pytest.mark.parametrize("with_pairs", [0, 3])
@pytest.mark.parametrize("seed", range(30))
def test_the_least_cost_under_a_damage_is_what_brute_force_finds(
    seed: int, with_pairs: int
) -> None:
    problem = random_problem(seed, with_pairs)
    limit = np.random.default_rng(seed + 2000).uniform(0.1, 1.5)
    found = least_cost(problem, limit)
    assert found is not None
    assert problem.damage(found) <= limit + 1e-9
    harmless = [options for options in allowed(problem) if problem.damage(options) <= limit]
    assert problem.cost(found) == pytest.approx(min(map(problem.cost, harmless)), rel=3e-3)


def test_a_further_limit_is_kept() -> None:
    sites = (Site("a", (0.0, 1.0)), Site("b", (0.0, 2.0)))
    cost = (Factor((0,), np.array([2.0, 0.0])), Factor((1,), np.array([1.0, 0.0])))
    size = (Factor((1,), np.array([10.0, 1.0])),)
    assert least_cost(Problem(sites, cost), damage_limit=2.0) == [1, 0]
    limited = Problem(sites, cost, limits=((size, 5.0),))
    assert least_cost(limited, damage_limit=2.0) == [0, 1]
    assert least_cost(limited, damage_limit=1.0) is None


def test_damage_that_buys_nothing_is_not_taken() -> None:
    """For MACs, int8 saves nothing: the plan must leave it alone, whatever damage is allowed."""
    sites = (Site("removal", (0.0, 0.5)), Site("int8", (0.0, 0.0)), Site("int8 too", (0.0, 0.1)))
    cost = (Factor((0,), np.array([2.0, 1.0])), Factor((1, 2), np.ones((2, 2))))
    assert least_cost(Problem(sites, cost), damage_limit=5.0) == [1, 0, 0]
    assert least_cost(Problem(sites, cost)) == [1, 0, 0]


def test_no_site_is_no_option() -> None:
    problem = Problem((), (Factor((), np.array(3.0)),))
    assert least_cost(problem) == []
    assert least_cost(Problem((), problem.factors, limits=((problem.factors, 2.0),))) is None
    assert total_cost(problem.factors, []) == 3.0
