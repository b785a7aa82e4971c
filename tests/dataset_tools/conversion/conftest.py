"""What the tests of conversion share: each output format, a source with everything in it, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset_tools.conversion.convert import convert
from tests.dataset_tools.conversion.trouble import FORMATS, Commands, mixed_files, options
from tests.dataset_tools.made_up import write_tar


@pytest.fixture(scope="module", params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def mixed_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("source") / "images.tar", mixed_files(300, 60))


@pytest.fixture(scope="module")
def mixed_whole(mixed_tar: Path, format: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What undisturbed conversions of `mixed_tar` with one worker make."""
    folder = tmp_path_factory.mktemp("whole") / format
    convert(mixed_tar, folder, options(format), workers=1)
    return folder


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    started = Commands(tmp_path)
    yield started
    started.end()
