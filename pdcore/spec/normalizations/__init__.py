"""Normalizations T(x): one file a contribution, with its statistics."""
