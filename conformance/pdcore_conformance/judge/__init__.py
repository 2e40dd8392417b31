"""Judge the results of a backend: the oracle, its error budget, and the comparison."""
