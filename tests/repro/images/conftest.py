"""The image data sets."""

from tests.image_sets import datasets_cache, make_folders, make_parquet, parquet  # noqa: F401
