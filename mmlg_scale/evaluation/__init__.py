"""Retrieval and zero-shot metrics, named and defined as in CLIP_benchmark."""
