import numpy as np
import pytest

from leoclr_fast.bench.statistics import median_interval, quantiles


def test_quantiles():
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"median": 3.5, "q20": 2.0, "q80": 5.0}
    assert quantiles([7.0]) == {"median": 7.0, "q20": 7.0, "q80": 7.0}


def test_the_interval_of_a_median_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = median_interval(rng.normal(2.0, 0.1, size=15).tolist(), seed=trial)
        assert interval["low"] <= interval["median"] <= interval["high"]
        covered += interval["low"] <= 2.0 <= interval["high"]
    assert 0.88 <= covered / 200 <= 1.0


def test_of_nothing():
    for function in (quantiles, median_interval):
        with pytest.raises(ValueError, match="at least one value"):
            function([])
