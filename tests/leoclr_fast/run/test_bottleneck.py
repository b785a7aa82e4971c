import pytest

from leoclr_fast.run.bottleneck import find_bottleneck


@pytest.mark.parametrize(
    ("wait", "real", "synthetic", "kind"),
    [
        (0.0, None, None, "compute-bound"),
        (0.099, None, None, "compute-bound"),
        (0.1, None, None, "partly data-bound"),
        (0.49, 100.0, 1000.0, "partly data-bound"),
        (0.5, None, None, "data-bound"),
        (1.0, None, None, "data-bound"),
        (0.02, 879.0, 1000.0, "copy-bound"),
        (0.02, 881.0, 1000.0, "compute-bound"),  # of 11.9 %, 2 % were waited for
        (0.09, 850.0, 1000.0, "compute-bound"),
        (0.0, 1100.0, 1000.0, "compute-bound"),
    ],
)
def test_kinds(wait: float, real: float | None, synthetic: float | None, kind: str) -> None:
    found = find_bottleneck(wait, loader="dali", on_cpu=False, real_images_per_s=real, synthetic_images_per_s=synthetic)
    assert found is not None
    assert found.kind == kind
    assert bool(found.remedy) == (kind != "compute-bound")
    assert str(found).startswith(f"{kind} (its steps waited for data ")


def test_the_reason_has_the_figures() -> None:
    found = find_bottleneck(0.75, loader="ffcv", on_cpu=False)
    assert str(found) == (
        "data-bound (its steps waited for data 75 % of the time, so that loading could speed it up at most 4.00 "
        "times); raise --loader.workers to the number of cores, or convert the data with --short-side 400, so that "
        "there is less to decode"
    )
    copying = find_bottleneck(0.01, loader="ffcv", on_cpu=False, real_images_per_s=800.0, synthetic_images_per_s=1000.0)
    assert copying is not None
    assert "synthetic images would be 1.25 times as fast" in copying.reason
