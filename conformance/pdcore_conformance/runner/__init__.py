"""Run the suite on a backend, and count its outcomes."""
