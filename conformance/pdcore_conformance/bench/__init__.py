"""Measure speed and memory, and compare them with named baselines."""
