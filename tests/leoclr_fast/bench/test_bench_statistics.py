import numpy as np

from leoclr_fast.bench.page import bench_page, markdown_table
from leoclr_fast.bench.statistics import median_interval, quantiles, ratio_interval


def test_quantiles():
    assert quantiles("ms", [5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"ms": 3.5, "ms_q20": 2.0, "ms_q80": 5.0}
    assert quantiles("ms", [7.0]) == {"ms": 7.0, "ms_q20": 7.0, "ms_q80": 7.0}


def test_a_ratio_is_that_of_the_pairs():
    assert ratio_interval([20.0, 60.0, 40.0], [10.0, 30.0, 20.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_the_interval_of_a_median_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = median_interval(rng.normal(2.0, 0.1, size=15).tolist(), seed=trial)
        assert interval["low"] <= interval["median"] <= interval["high"]
        covered += interval["low"] <= 2.0 <= interval["high"]
    assert 0.88 <= covered / 200 <= 1.0


def test_a_page():
    table = markdown_table(("a", "b"), [("x|y", "1")])
    assert table == "| a | b |\n|---|---:|\n| x\\|y | 1 |\n"
    page = bench_page("Title", "Setting", table, rounds="3 rounds.", command="type", notes=["n"], remarks=["r"])
    head = "# Title\n\nSetting.\n\n`type`\n\n- n\n\nMedian [20 %, 80 %] of 3 rounds.\n\n"
    assert page == f"{head}{table}\n- r\n"
    bare = bench_page("Title", "Setting", table, rounds="3 rounds.")
    assert bare == f"# Title\n\nSetting.\n\nMedian [20 %, 80 %] of 3 rounds.\n\n{table}"
