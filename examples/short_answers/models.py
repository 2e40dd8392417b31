"""An encoder with the attention of a spec, a bidirectional GRU, and what both share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pdcore_adapters.torch_nn import convert

from .corpora import Answer, words_of
from .vectors import WIDTH

__all__ = ["GRU", "HEADS", "Assessor", "Texts", "encode", "table_of"]

HEADS = 10
LAYERS = 2

#: Places of a word within its text that have a vector; later words have that of the last.
PLACES = 64

#: The parts of a sequence.
QUESTION, REFERENCE, ANSWER, PADDING = range(4)

#: The name of the recurrent model, where those of the others are specs.
GRU = "gru"


class Texts(NamedTuple):
    """Answers as sequences: the words of the question, of the reference, and of the answer.

    Attributes
    ----------
    words : int64 Tensor (B, N)
        Rows of the table of vectors.
    parts, places : int64 Tensor (B, N)
        The part of a word, and its place within it.
    correct : float Tensor (B,)
        1 for a correct answer, else 0.
    """

    words: Tensor
    parts: Tensor
    places: Tensor
    correct: Tensor

    @property
    def lengths(self) -> Tensor:
        """The number of words of each sequence, int64 (B,)."""
        return (self.parts != PADDING).sum(1)

    def at(self, rows: Tensor) -> Texts:
        """Return some sequences, without the padding that none of them needs."""
        longest = int(self.lengths[rows].max())
        return Texts(*(x[rows, :longest] for x in self[:3]), self.correct[rows])


def table_of(vectors: Mapping[str, Any]) -> tuple[dict[str, int], Tensor]:
    """Return the rows of the words, from 1, and the table; row 0 is zero, for other words."""
    rows = {word: row for row, word in enumerate(vectors, 1)}
    table = np.stack([np.zeros(WIDTH, dtype=np.float32), *vectors.values()])
    return rows, torch.from_numpy(table)


def encode(answers: Sequence[Answer], rows: Mapping[str, int]) -> Texts:
    """Return the sequences of answers, padded to the longest."""
    sequences = [[words_of(text) for text in answer[:3]] for answer in answers]
    longest = max(sum(map(len, texts)) for texts in sequences)
    arrays = np.zeros((3, len(answers), longest), dtype=np.int64)
    arrays[1] = PADDING
    for i, texts in enumerate(sequences):
        words = [rows.get(word, 0) for text in texts for word in text]
        parts = [part for part, text in enumerate(texts) for _ in text]
        places = [min(place, PLACES - 1) for text in texts for place in range(len(text))]
        arrays[:, i, : len(words)] = words, parts, places
    correct = torch.tensor([float(answer.correct) for answer in answers])
    return Texts(*torch.from_numpy(arrays), correct)


class Assessor(nn.Module):  # type: ignore[misc]
    """Vectors of words, parts and places; a reader; means over reference and answer; a linear map.

    Parameters
    ----------
    name : str
        The spec of the attention of an encoder, or ``gru`` for a bidirectional GRU.
    table : float Tensor (words, 50)
        The vectors of the words, which are not trained.
    dropout : float
        The dropout of features, outside attention.
    """

    def __init__(self, name: str, table: Tensor, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(table)
        self.parts, self.places = nn.Embedding(4, WIDTH), nn.Embedding(PLACES, WIDTH)
        for added in (self.parts, self.places):
            nn.init.normal_(added.weight, std=0.1)
        self.dropout = nn.Dropout(dropout)
        self.reader = _Recurrent() if name == GRU else _Encoder(name, dropout)
        self.classify = nn.Linear(4 * self.reader.width, 1)

    def forward(self, texts: Texts) -> Tensor:
        """Return the logits (B,) of being correct."""
        x = self.words(texts.words) + self.parts(texts.parts) + self.places(texts.places)
        x = self.reader(self.dropout(x), texts)
        reference, answer = (_mean(x, texts.parts == part) for part in (REFERENCE, ANSWER))
        features = (reference, answer, (reference - answer).abs(), reference * answer)
        return self.classify(self.dropout(torch.cat(features, dim=1)))[:, 0]


class _Encoder(nn.Module):  # type: ignore[misc]
    """The encoder of PyTorch, whose attention layers are converted to a spec."""

    width = WIDTH

    def __init__(self, spec: str, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False)
        convert(self.encoder, spec, dropout=0.0)

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        return self.encoder(x, src_key_padding_mask=texts.parts == PADDING)


class _Recurrent(nn.Module):  # type: ignore[misc]
    """One bidirectional layer, of about as many parameters as the encoder."""

    width = 128

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, self.width // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        packed = pack_padded_sequence(x, texts.lengths, batch_first=True, enforce_sorted=False)
        read, length = self.gru(packed)[0], x.shape[1]
        return pad_packed_sequence(read, batch_first=True, total_length=length)[0]


def _mean(x: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean (B, width) over the chosen (B, N) words."""
    return (x * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)
