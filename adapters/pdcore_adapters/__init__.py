"""Adapters that put a pdcore attention inside the layers and models of other libraries.

There is one module for each library: `pdcore_adapters.torch_nn` for `torch.nn`, and `transformers`,
`flax`, `equinox`, `sklearn` and `aeon` for the libraries of these names. Only importing such a
module imports its library.
"""
