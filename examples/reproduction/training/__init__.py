"""The data of a small transformer, and its training with checkpoints and a test.

The examples train one specification at a time; `reproduction` compares several. The model is that
of `pdcore_adapters.time_series`.
"""
