"""Where images come from: random access to (encoded bytes, label, name), in a fixed order."""

from dataset_tools.sources.open_source import open_source
from dataset_tools.sources.split import ImageSource, Split

__all__ = ["ImageSource", "Split", "open_source"]
