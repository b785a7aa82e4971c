"""What all tests share: the folder of real data, and how many inputs hypothesis draws."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import is_hypothesis_test, settings

from dataset_tools.command_line import PACKAGES
from dataset_tools.stop_signals import HANDLED

settings.register_profile("quick", max_examples=40, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=100_000, derandomize=True, deadline=None, database=None)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("long" if config.option.markexpr == "long" else "quick")
    for number in HANDLED:  # what the shell ignores stays ignored, as for nohup and in the background
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


_SLOWEST_FILES = (
    *("test_faults", "test_fake_gpu", "test_triton_interpreter", "test_kill", "test_resume", "test_many_ranks"),
    *("test_loader", "test_report", "test_info_nce_triton", "test_round_trip", "test_gpu_suite"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that take long begin first, so that none is left for one worker alone at the end.

    Tests with drawn inputs belong to both: a few inputs each time, many in `make test-long`.
    """
    places = {name: place for place, name in enumerate(_SLOWEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if config.option.markexpr == "long":
        for item in items:
            if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj):
                item.add_marker("long")
                item.add_marker(pytest.mark.timeout(3600))


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, dict[str, Any], dict[str, Any]]:
    """Names that are not UTF-8, in what a test logged, are escaped: the workers send their reports as UTF-8."""
    report = yield
    if report and "sections" in report:
        report["sections"] = [
            (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report["sections"]
        ]
    return report


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Iterator[None]:
    """A rank that ends ignores SIGTERM from then on, and tests that are one are no process of their own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that LEOCLR_TEST_DATA names, with the real archives."""
    named = os.environ.get("LEOCLR_TEST_DATA")
    if not named:
        pytest.skip("LEOCLR_TEST_DATA does not name the folder of real data")
    folder = Path(named)
    for name in ("cifar10-jpeg.tar.xz", "imagenet-sample-400.tar"):
        if not (folder / name).is_file():
            pytest.skip(f"LEOCLR_TEST_DATA={named} has no {name}")
    return folder


@pytest.fixture
def package_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """caplog for the packages' loggers, also where the command line has given them handlers of their own."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    kept = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [caplog.handler], False
        logger.setLevel(logging.INFO)
    yield caplog
    for logger, handlers, propagate, level in kept:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
