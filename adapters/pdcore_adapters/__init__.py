"""Adapters that put a pdcore attention inside other libraries' layers and models.

One module for each library, importing that library when the module itself is imported and never
before: `pdcore_adapters.torch_nn` for `torch.nn`, and `transformers`, `flax`, `equinox` and
`sklearn` for the libraries of that name.
"""
