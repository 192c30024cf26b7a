"""The commands of `qrhash`, one function that makes each.

Loaded when the command line is, and what a command runs when it does: `qrhash --help` waits for
neither JAX nor Arrow.
"""
