"""Decoding: attention of a growing sequence, whose past is carried in a state."""

from __future__ import annotations

from .decoder import Decoder, decoder

__all__ = ["Decoder", "decoder"]
