"""Image-text pairs: making data sets, packing them into webdataset shards, and reading them at an exact position."""
