"""The JSON record of a run: its types, its writing and reading."""
