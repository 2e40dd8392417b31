"""What a call must give: the oracle, its error budget, and the comparison."""
