"""What the code uses of Triton is in the release of a machine with a GPU, and in this one.

tests/backends/torch/test_torch_names.py holds the code against the list of that release.
"""

from __future__ import annotations

import importlib
import json
from operator import attrgetter

from names_of_release import LIST


def test_every_name_of_triton_is_here():
    importlib.import_module("triton.language")
    listed = json.loads(LIST.read_text(encoding="utf-8"))
    names = [name for name in listed if name.startswith("triton.")]
    assert "triton.language.load" in names
    for name in names:
        attrgetter(name.removeprefix("triton."))(importlib.import_module("triton"))
