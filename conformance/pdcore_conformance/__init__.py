"""The conformance suite: whether a backend computes what the specification says, and how fast.

The error budget is here. The pytest plugin, the cases and the record of a run are to join it, and
are not part of this release.
"""
