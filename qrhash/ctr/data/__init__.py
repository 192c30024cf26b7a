"""Rows of click data: read, decoded, numbered, batched."""
