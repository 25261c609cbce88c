"""Data: making, packing, indexing, checking and reading webdataset shards of image-text pairs."""

SPLITS = ("train", "val", "test")
RESTVAL = ("train", "drop")
"""What may become of the restval images of a Karpathy file."""
