"""A new backend from a template."""
