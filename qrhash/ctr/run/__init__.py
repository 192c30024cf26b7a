"""A run: its devices, its steps, its records, from the first line to the last."""
