"""A small transformer that is trained: its data, model and protocol.

The examples train it one specification at a time; `pdcore_conformance.reproduce` compares
specifications by it.
"""
