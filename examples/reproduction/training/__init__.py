"""A small transformer that is trained: its data, model and protocol.

The examples train it one specification at a time; `reproduction` compares
specifications by it.
"""
