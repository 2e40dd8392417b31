"""Accuracy, head redundancy and cost of attentions beside softmax, measured by one protocol.

The command is ``python examples/reproduce.py``.
"""
