"""The spec of a model in its config, so that a checkpoint is not loaded as another model."""

from __future__ import annotations

from typing import Any

__all__ = ["RECORD", "record_spec"]

#: The attribute of a config, and the key in its file, with the spec.
RECORD = "pdcore_spec"


def record_spec(where: str, name: str, spec: str, module: Any) -> None:
    """Write the spec of a layer, and the name of its attention, into the config of the layer.

    transformers saves the attributes of a config, and takes ``attn_implementation`` from a saved
    config as the attention of the model: an error unless the name is registered. Nothing is
    written for ``softmax``, which every attention of transformers computes.

    Raises
    ------
    ValueError
        For a layer that has not run yet, if its config says that it was trained with another spec.
    """
    config = getattr(module, "config", None)
    if config is None:
        return
    saved = getattr(config, RECORD, None)
    if saved and saved != spec and not hasattr(module, "pdcore_ran"):
        raise ValueError(
            f"{where}: got the spec {spec}, and the config says that the model was trained with "
            f"{saved}; register that spec, or set {RECORD} of the config to None to change it"
        )
    if not hasattr(module, "pdcore_ran"):
        # Tells layers that change their spec from those of a checkpoint that was just loaded.
        module.pdcore_ran = True
    wanted = None if spec == "softmax" else spec
    if saved != wanted:
        setattr(config, RECORD, wanted)
    if wanted and getattr(config, "attn_implementation", None) != name:
        config.attn_implementation = name
    elif not wanted and saved:
        config.attn_implementation = None
