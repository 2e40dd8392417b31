"""The template of a new backend, and the function that fills it in."""
