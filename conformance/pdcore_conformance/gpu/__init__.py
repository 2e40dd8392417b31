"""The command that judges and measures the backends on a machine with a GPU."""
