"""imagemill classifies pictures in bulk: folders in, one Parquet row per picture out."""

from imagemill.version import __version__

__all__ = ["__version__"]
