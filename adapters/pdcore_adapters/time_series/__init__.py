"""A small transformer that classifies series of any length: its arrays, model and training.

`pdcore_adapters.aeon` and the examples that train in PyTorch share it. `arrays` needs NumPy only,
`model` and `training` need PyTorch.
"""
