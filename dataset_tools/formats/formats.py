"""The output formats of `convert`: one row each."""

from __future__ import annotations

from dataset_tools.formats.beton import Beton
from dataset_tools.formats.output_format import OutputFormat
from dataset_tools.formats.tar_shards import TarShards

FORMATS: dict[str, OutputFormat] = {
    "ffcv": Beton(),
    "webdataset": TarShards(),
}
"""What --format takes."""
