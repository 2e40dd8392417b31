"""The conformance suite: whether a backend computes what the specification says, and how fast.

It will hold the pytest plugin, the cases, the error budget and the record of a run. None of these
is part of this release.
"""
