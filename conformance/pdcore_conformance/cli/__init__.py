"""The commands that conformance adds to ``pdcore``."""
