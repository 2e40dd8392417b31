"""A small transformer: its data, model and training.

The examples train one specification at a time; `reproduction` compares several.
"""
