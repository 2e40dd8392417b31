"""What the code uses of PyTorch is in the release of a machine with a GPU, and in this one.

`names_of_2_11.json` has each name with the signatures of PyTorch 2.11.0 and Triton 3.6.0, of
operators the schemas. See tests/shared/names_of_release.py for how the list is written.
"""

from __future__ import annotations

import importlib
import json
from functools import reduce
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from names_in_use import Use, uses
from names_of_release import LIST, Release, files, of_folder

#: How the names of operators begin, which the list has by their schemas.
OPERATORS = ("torch.ops.aten.", "torch._")

#: NumPy's words for arguments, which PyTorch takes too.
NUMPY = {"axis": "dim", "keepdims": "keepdim"}


@pytest.fixture(scope="module")
def used():
    return uses(files())


@pytest.fixture(scope="module")
def listed():
    return json.loads(LIST.read_text(encoding="utf-8"))


def schemas(name, texts):
    """Parse the schemas of an operator by overload; none for what is no operator."""
    if not name.startswith(OPERATORS) or not texts or "(" not in texts[0]:
        return {}
    parsed = [torch._C.parse_schema(f"aten::{text}") for text in texts]
    return {schema.overload_name: schema for schema in parsed}


def schemas_here(name):
    operator = name.removeprefix("torch.ops.aten.").removeprefix("torch.").partition(".")[0]
    found = torch._C._jit_get_schemas_for_operator(f"aten::{operator}")
    return {schema.overload_name: schema for schema in found}


def signature(schema):
    """Return what `names_of_release.signature` does, from the schema of an operator."""
    plain = [x for x in schema.arguments if not x.kwarg_only]
    named = [x for x in schema.arguments if x.kwarg_only]
    words = [x.name + ("=" if x.has_default_value() else "") for x in plain]
    more = [x.name + ("=" if x.has_default_value() else "") for x in named]
    return ", ".join([*words, *(["*", *more] if more else [])])


def takes(signature, use):
    """Check whether a call gives what a signature asks for, and nothing else."""
    words = signature.split(", ") if signature else []
    keywords = {NUMPY.get(word, word) for word in use.keywords}
    plain = list(takewhile(lambda word: not word.startswith("*"), words))
    named = [word for word in words[len(plain) :] if not word.startswith("*")]
    anything = any(word.startswith("**") for word in words)
    many = any(word[:1] == "*" and word[1:2] not in ("", "*") for word in words)
    if not anything and not keywords <= {word.rstrip("=") for word in (*plain, *named)}:
        return False
    if use.positional is None:
        return True
    needed = {x for x in (*plain[use.positional :], *named) if not x.endswith("=")}
    twice = keywords & {word.rstrip("=") for word in plain[: use.positional]}
    return (use.positional <= len(plain) or many) and needed <= keywords and not twice


def given(schema, use):
    """Return the arguments of an operator that a call gives, all of them if some are starred."""
    plain = [x for x in schema.arguments if not x.kwarg_only]
    first = plain if use.positional is None else plain[: use.positional]
    named = [x for x in schema.arguments if x.name in use.keywords]
    return [(x.name, str(x.type), x.kwarg_only) for x in (*first, *named)]


def test_every_name_is_in_2_11(used, listed):
    unknown = {f"{use.name} ({use.place})" for use in used if use.name not in listed}
    assert not unknown, "not in the list; names_of_release.py writes it again from the wheels"
    absent = [use for use in used if not use.optional and listed[use.name] is None]
    assert not absent
    assert not listed.keys() - {use.name for use in used}, "in the list, but not used any more"


def test_every_call_is_one_that_2_11_takes(used, listed):
    wrong = []
    for use in used:
        texts = listed[use.name]
        if use.called and texts:
            known = [signature(x) for x in schemas(use.name, texts).values()] or texts
            if not any(takes(x, use) for x in known):
                wrong.append((use, known))
    assert not wrong


def test_operators_are_called_by_overload(used):
    # By name alone the first overload is called that accepts the arguments: flash attention has
    # another, whose arguments in the places of dropout_p and is_causal accept any number.
    calls = [use for use in used if use.called and use.name.startswith("torch.ops.")]
    assert len(calls) >= 5
    assert all(use.name.count(".") == 4 for use in calls), calls


def test_every_name_of_2_11_is_here(listed):
    for name, texts in listed.items():
        if texts is not None and name.startswith("torch."):
            assert found(name) is not None or name == "torch.version.cuda", name


def found(name):
    """Import the longest part of a name that is a module, and return the attribute of it."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[cut:], module)
    raise ModuleNotFoundError(name)


def test_operators_take_here_what_they_take_in_2_11(used, listed):
    held = set()
    for use in used:
        there = schemas(use.name, listed[use.name]) if use.called else {}
        if not there:
            continue
        here = schemas_here(use.name)
        for overload, schema in there.items():
            if takes(signature(schema), use):
                assert given(schema, use) == given(here[overload], use), use
                results = [[str(x.type) for x in s.returns] for s in (schema, here[overload])]
                assert results[0] == results[1], use
                assert takes(signature(here[overload]), use), use
                held.add(use.name)
    assert "torch.ops.aten._scaled_dot_product_flash_attention_backward.default" in held
    assert {x.name for x in used if x.called and schemas(x.name, listed[x.name])} == held


def test_the_reader_knows_this_release():
    release = Release(of_folder(Path(torch.__file__).parents[1]))
    assert release.signatures("torch.nn.attention.sdpa_kernel") == ["backends, set_priority="]
    assert release.signatures("torch.nn.attention.flex_attention.AuxRequest") is not None
    assert release.signatures("torch.backends.mkldnn.matmul") == []
    assert release.signatures("torch.inf") == []
    for name in ("torch.nn.attention.no_such", "torch.cuda.no_such", "torch._C._no_such"):
        assert release.signatures(name) is None
    [schema] = release.signatures("torch.ops.aten._scaled_dot_product_efficient_attention")
    assert schema.startswith("_scaled_dot_product_efficient_attention(Tensor query")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("torch.nn.functional.pad(x, y, value=0)", "torch.nn.functional.pad"),
        ("from torch.nn import functional as f\nf.pad(x, y, value=0)", "torch.nn.functional.pad"),
        ("from torch.nn.functional import pad\npad(x, y, value=0)", "torch.nn.functional.pad"),
        ("f = torch.nn.functional\nf.pad(x, y, value=0)", "torch.nn.functional.pad"),
        ("def g(torch):\n    torch.cumsum(x, 0, value=1)", "torch.cumsum"),
        ('t = importlib.import_module("torch")\nt.cumsum(x, 0, value=1)', "torch.cumsum"),
        ("self.c, n = torch.cuda, 0\nself.c.sync(a, b, value=0)", "torch.cuda.sync"),
        ("torch.f\n(x @ y).addcmul_(a, b, value=2.0)", "torch.Tensor.addcmul_"),
    ],
)
def test_uses_are_found(code, expected, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(code)
    [use] = [use for use in uses([file]) if use.called]
    assert use[:1] + use[3:] == (expected, 2, frozenset({"value"}), True)


def test_a_name_read_with_a_default_may_be_absent(tmp_path):
    file = tmp_path / "module.py"
    file.write_text('import torch\ngetattr(torch.backends, "new", None)\ntorch.backends.new')
    assert [use.optional for use in uses([file]) if use.name.endswith("new")] == [True, False]


@pytest.mark.parametrize(
    ("text", "positional", "keywords", "answer"),
    [
        ("a, b=, *, c=", 1, {"c"}, True),
        ("a, b=, *, c=", 3, set(), False),
        ("a, b=, *, c=", 0, set(), False),
        ("a, b=, *, c=", 1, {"d"}, False),
        ("a, b=, *, c=", 2, {"b"}, False),
        ("a, *, c", 1, set(), False),
        ("*size, c=", 5, {"c"}, True),
        ("a, **rest", 1, {"d"}, True),
        ("a, b", None, set(), True),
        ("", 0, set(), True),
    ],
)
def test_takes(text, positional, keywords, answer):
    use = Use("f", "here", positional=positional, keywords=frozenset(keywords), called=True)
    assert takes(text, use) is answer
