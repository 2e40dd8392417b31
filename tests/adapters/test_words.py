"""The specs by which the tests of the adapters cover the words of the grammar."""

from __future__ import annotations

import os
import subprocess
import sys

import specs_of_words


def test_every_word_has_a_spec() -> None:
    # In a process without the plugins of third parties, whose words need not be here.
    command = "import specs_of_words; print(*specs_of_words.missing_words())"
    folder = os.path.dirname(specs_of_words.__file__)
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | {"PDCORE_PLUGINS": "", "PYTHONPATH": folder},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []
