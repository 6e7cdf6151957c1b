"""The exact solver, against trying everything."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.study.knapsack import UNIT, solve

# few sizes and few damages make ties; any damages make hard cases
DAMAGES = st.one_of(st.integers(-3, 3).map(lambda n: n / 2), st.floats(-1, 1, width=32))
GROUPS = st.lists(st.lists(st.tuples(st.integers(1, 12), DAMAGES), min_size=1, max_size=5), min_size=1, max_size=5)


def everything(groups, limit):
    """Picks that fit, best first: by damage, bytes, then the options' order by size from the last group backwards."""

    def rank(g, i):
        return sorted(range(len(groups[g])), key=lambda j: (groups[g][j][0], round(groups[g][j][1] / UNIT), j)).index(i)

    found = []
    for pick in itertools.product(*(range(len(group)) for group in groups)):
        size = sum(groups[g][i][0] for g, i in enumerate(pick))
        if size <= limit:
            damage = sum(round(groups[g][i][1] / UNIT) for g, i in enumerate(pick))
            found.append((damage, size, [rank(g, i) for g, i in reversed(list(enumerate(pick)))], list(pick)))
    return sorted(found)


@settings(max_examples=300, deadline=None)
@given(GROUPS, st.integers(0, 40))
def test_it_is_the_best_of_everything(groups, spare):
    limit = sum(min(size for size, _ in group) for group in groups) + spare
    assert solve(groups, limit) == everything(groups, limit)[0][-1]


def test_many_groups_of_a_real_size(rng):
    sizes = [84, 110, 144, 176, 210, 272]
    groups = []
    for i in range(225):
        n, scale = (65536, 65536, 176128)[i % 3], 10 ** rng.normal(-4, 1)
        groups.append([(n * size, scale * 4.0 ** (-size / 32) * rng.uniform(0.9, 1.1)) for size in sizes])
    limit = sum(group[2][0] for group in groups)
    pick = solve(groups, limit)
    total = sum(groups[g][i][1] for g, i in enumerate(pick))
    assert sum(groups[g][i][0] for g, i in enumerate(pick)) <= limit
    # no exchange of two options makes it better
    for a, b in itertools.combinations(range(0, 225, 9), 2):
        others = sum(groups[g][i][0] for g, i in enumerate(pick) if g not in (a, b))
        rest = total - groups[a][pick[a]][1] - groups[b][pick[b]][1]
        for (size_a, damage_a), (size_b, damage_b) in itertools.product(groups[a], groups[b]):
            assert others + size_a + size_b > limit or rest + damage_a + damage_b >= total - 1e-14


def test_bad_input():
    with pytest.raises(ValueError, match="limit=1 bytes, must be at least 3: the sum of the smallest options"):
        solve([[(1, 0.0)], [(2, 0.0), (5, 0.0)]], 1)
    with pytest.raises(ValueError, match="must be numbers up to 4096"):
        solve([[(1, float("nan"))]], 1)
    with pytest.raises(ValueError, match="at least one"):
        solve([[]], 1)
