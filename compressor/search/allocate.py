"""Which choice at which site: the least cost for a total damage, exactly.

Damage adds over sites, but for pairs that were measured together; cost does not: what a convolution
costs depends on the widths of its input and its output, on its bits, and on whether its block is
there at all. So cost is a sum of *factors*, each a table over the options of the few sites that
touch one layer. This is the multiple-choice knapsack with such tables, as a mixed-integer linear
program: integer per option, and for each factor a continuous joint distribution whose marginals are
those integers, which makes it integral by itself.
Solved by HiGHS through `scipy.optimize.milp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Floats = NDArray[np.float64]

MOST_NODES = 5_000  # of the search tree: a limit that does not depend on the machine's load
RELATIVE_GAP = 1e-5  # far below what the measured tables are worth
TIE_BREAK = 1e-3  # part of the whole cost that the damages of all choices together weigh
MOST_DAMAGE = 5.0  # nats: a hopeless choice must not make all others alike
LEAST_DAMAGE = 1e-6  # a choice that measured no damage is still a change


@dataclass(frozen=True)
class Site:
    """A place where one of several options is taken; option 0 leaves it alone.

    Attributes:
        name: unique in a problem.
        damage: what each option costs in quality, damage[0] == 0.
    """

    name: str
    damage: tuple[float, ...]


@dataclass(frozen=True)
class Factor:
    """A part of the cost.

    Attributes:
        sites: indices of the sites that it depends on; none for a constant.
        cost: one axis a site, in that order, with an entry for each of its options.
    """

    sites: tuple[int, ...]
    cost: Floats


@dataclass(frozen=True)
class Problem:
    """What is chosen from.

    Attributes:
        sites: all of them.
        factors: whose sum is the objective's cost.
        overrules: pairs of sites; taking any option of the first forbids those of the second.
        interactions: damage beyond the sum, of options that are taken together.
        limits: further resources, each with its factors and its upper bound.
    """

    sites: tuple[Site, ...]
    factors: tuple[Factor, ...]
    overrules: tuple[tuple[int, int], ...] = ()
    limits: tuple[tuple[tuple[Factor, ...], float], ...] = field(default=())
    interactions: tuple[Factor, ...] = ()

    def cost(self, options: Sequence[int]) -> float:
        """The objective's cost when option `options[i]` is taken at site i."""
        return total_cost(self.factors, options)

    def damage(self, options: Sequence[int]) -> float:
        """The sum of the damages of the options taken, and of what they do to each other."""
        alone = sum(site.damage[o] for site, o in zip(self.sites, options, strict=True))
        return float(alone) + total_cost(self.interactions, options)


def total_cost(factors: Sequence[Factor], options: Sequence[int]) -> float:
    """The sum of the factors' entries at the options taken."""
    return float(sum(factor.cost[tuple(options[s] for s in factor.sites)] for factor in factors))


def least_cost(problem: Problem, damage_limit: float = np.inf) -> list[int] | None:
    """The options of least cost whose damage is at most `damage_limit`; None if there are none."""
    program = _Program(problem)
    damage = program.damage()
    if np.isfinite(damage_limit):
        together, _ = program.cost(problem.interactions)
        row = {at: damage.get(at, 0.0) + together.get(at, 0.0) for at in {**damage, **together}}
        program.at_most(row, damage_limit)
    objective, _ = program.cost(problem.factors)
    # Of options that cost the same the harmless one: damage that buys nothing is not taken.
    whole = problem.cost([0] * len(problem.sites))
    harms = {column: min(harm, MOST_DAMAGE) for column, harm in damage.items()}
    weight = TIE_BREAK * whole / max(sum(harms.values()), TIE_BREAK)
    for (_, option), column in program.option_at.items():
        if option:
            harm = weight * max(harms[column], LEAST_DAMAGE)
            objective[column] = objective.get(column, 0.0) + harm
    return program.solve(objective)


class _Program:
    """Variables and rows of the mixed-integer program of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.option_at: dict[tuple[int, int], int] = {}
        for i, site in enumerate(problem.sites):
            for o in range(len(site.damage)):
                self.option_at[i, o] = len(self.option_at)
        self.integers = self.size = len(self.option_at)
        self.joint_at: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        self.problem = problem
        self._rows: list[tuple[list[int], list[float], float, float]] = []
        for i, site in enumerate(problem.sites):
            ones = [self.option_at[i, o] for o in range(len(site.damage))]
            self._add(ones, [1.0] * len(ones), 1.0, 1.0)
        for first, second in problem.overrules:
            taken = self._taken(first) + self._taken(second)
            self._add(taken, [1.0] * len(taken), 0.0, 1.0)
        for factors, bound in problem.limits:
            row, constant = self.cost(factors)
            self.at_most(row, bound - constant)

    def damage(self) -> dict[int, float]:
        """Coefficients of the variables: of each option alone."""
        return {at: self.problem.sites[i].damage[o] for (i, o), at in self.option_at.items()}

    def cost(self, factors: Sequence[Factor]) -> tuple[dict[int, float], float]:
        """Coefficients of the variables, and the constant part."""
        row: dict[int, float] = {}
        constant = 0.0
        for factor in factors:
            if not factor.sites:
                constant += float(factor.cost)
                continue
            joint = self._joint(factor.sites)
            for options in np.ndindex(factor.cost.shape):
                row[joint[options]] = row.get(joint[options], 0.0) + float(factor.cost[options])
        return row, constant

    def at_most(self, row: Mapping[int, float], bound: float) -> None:
        """Add a row: the sum over its variables is bounded."""
        self._add(list(row), list(row.values()), -np.inf, bound)

    def solve(self, objective: Mapping[int, float]) -> list[int] | None:
        """The options that make `objective` least."""
        if not self.size:
            return [] if all(high >= 0 for *_, high in self._rows) else None
        c = np.zeros(self.size)
        c[list(objective)] = list(objective.values())
        integrality = np.zeros(self.size, dtype=np.int64)
        integrality[: self.integers] = 1
        found = milp(
            c,
            integrality=integrality,
            bounds=Bounds(0, 1),
            constraints=self._constraints(),
            options={"node_limit": MOST_NODES, "mip_rel_gap": RELATIVE_GAP},
        )
        if found.x is None:
            return None
        return [
            max(range(len(site.damage)), key=lambda o: found.x[self.option_at[i, o]])
            for i, site in enumerate(self.problem.sites)
        ]

    def _joint(self, sites: tuple[int, ...]) -> dict[tuple[int, ...], int]:
        """Variables of the joint choice at `sites`; a single site's are its own."""
        if len(sites) == 1:
            count = len(self.problem.sites[sites[0]].damage)
            return {(o,): self.option_at[sites[0], o] for o in range(count)}
        if sites not in self.joint_at:
            shape = tuple(len(self.problem.sites[s].damage) for s in sites)
            joint = {options: self.size + k for k, options in enumerate(np.ndindex(shape))}
            self.size += len(joint)
            self.joint_at[sites] = joint
            for axis, site in enumerate(sites):
                for o in range(shape[axis]):
                    columns = [at for options, at in joint.items() if options[axis] == o]
                    self._add(
                        [*columns, self.option_at[site, o]], [1.0] * len(columns) + [-1.0], 0.0, 0.0
                    )
        return self.joint_at[sites]

    def _taken(self, site: int) -> list[int]:
        return [self.option_at[site, o] for o in range(1, len(self.problem.sites[site].damage))]

    def _add(self, columns: list[int], values: list[float], low: float, high: float) -> None:
        self._rows.append((columns, values, low, high))

    def _constraints(self) -> LinearConstraint:
        rows = [k for k, (columns, *_) in enumerate(self._rows) for _ in columns]
        columns = [c for columns, *_ in self._rows for c in columns]
        values = [v for _, values, *_ in self._rows for v in values]
        matrix = coo_array((values, (rows, columns)), shape=(len(self._rows), self.size))
        return LinearConstraint(
            matrix.tocsr(), [row[2] for row in self._rows], [row[3] for row in self._rows]
        )
