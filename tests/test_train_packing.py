"""Plans hold every example once, keep to their budget, waste little, and are functions of seed and epoch."""
import subprocess
import sys

import numpy as np
import pytest

from vlm_repro.train.packing import length_groups, pack, pack_epoch, padding_share

RNG = np.random.default_rng(3)
SETS = {"skewed": np.minimum(np.exp(RNG.normal(5.2, .8, 1500)).astype(int) + 20, 2048).tolist(), "equal": [700] * 40, "two kinds": [100] * 300 + [1900] * 30,
        "one": [5], "none": [], "full rows": [2048] * 7, "random": RNG.integers(1, 2049, 400).tolist()}


def flat(plan) -> list[int]:
    return sorted(i for row in plan for i in row)


@pytest.mark.parametrize("lengths", SETS.values(), ids=SETS)
def test_packing_holds_every_example_once_within_the_budget(lengths):
    plan = pack(lengths, 2048)
    assert flat(plan) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 2048 for row in plan)


@pytest.mark.parametrize("lengths", SETS.values(), ids=SETS)
def test_best_fit_leaves_no_two_rows_that_fit_together(lengths):
    fill = sorted(sum(lengths[i] for i in row) for row in pack(lengths, 2048))
    assert len(fill) < 2 or fill[0] + fill[1] > 2048


def test_best_fit_takes_the_row_that_is_filled_best():
    assert pack([5, 7, 3, 1], 8) == [(1, 3), (0, 2)]
    assert pack([4, 4, 4], 8) == [(0, 1), (2,)]


def test_an_example_longer_than_a_row_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="1 examples are longer than a row of 8 tokens, first number 2 with 9"): pack([1, 8, 9], 8)


def test_padding_is_below_five_percent_on_the_skewed_set_and_was_far_above():
    lengths = SETS["skewed"]
    arrival = [range(i, min(i + 8, 1500)) for i in range(0, 1500, 8)]
    assert padding_share(arrival, lengths) > .4
    assert padding_share(pack(lengths, 2048), lengths, 2048) < .05
    assert padding_share(pack_epoch(lengths, 2048, 0, 0), lengths, 2048) < .05
    assert padding_share(length_groups(lengths, 0, 0, batch_size=8), lengths) < .05
    assert padding_share(length_groups(lengths, 0, 0, max_tokens=4096), lengths) < .05


def test_padding_share_counts_positions():
    assert padding_share([(0, 1)], [3, 1]) == 1 - 4 / 6 and padding_share([(0, 1)], [3, 1], 8) == .5 and padding_share([], []) == 0


@pytest.mark.parametrize("make", [lambda n, s, e: pack_epoch(n, 2048, s, e, window=300), lambda n, s, e: length_groups(n, s, e, batch_size=4, window=100)], ids=["pack", "group"])
def test_an_epoch_is_a_function_of_seed_and_epoch(make):
    lengths = SETS["skewed"]
    plans = {(s, e): make(lengths, s, e) for s in (0, 1) for e in (0, 1)}
    assert all(flat(p) == list(range(1500)) for p in plans.values())
    assert make(lengths, 0, 1) == plans[0, 1]
    assert len({tuple(p) for p in plans.values()}) == 4


def test_an_epoch_is_the_same_in_another_process():
    code = "from vlm_repro.train.packing import pack_epoch; print(pack_epoch([7, 2, 5, 3, 1, 6, 8, 4], 10, 5, 2))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(pack_epoch([7, 2, 5, 3, 1, 6, 8, 4], 10, 5, 2))


def test_groups_keep_to_both_limits_and_a_long_example_stands_alone():
    lengths = [*SETS["random"], 5000]
    plan = length_groups(lengths, 0, 0, batch_size=6, max_tokens=3000)
    assert flat(plan) == list(range(401))
    assert all(len(b) <= 6 and len(b) * max(lengths[i] for i in b) <= 3000 for b in plan if 400 not in b) and (400,) in plan
    with pytest.raises(ValueError, match="batch_size or max_tokens"): length_groups(lengths, 0, 0)
