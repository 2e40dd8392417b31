"""The words of Attention-BN without division: grammar, parameters, LaTeX, derivation."""

from __future__ import annotations

import pytest

import pdcore
from pdcore import AttentionSpec, Batch, SpecError, UnsupportedError, parse

BARE = Batch(with_std=False)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("bn(with_std=false)", "softmax+bn(with_std=false)"),
        ("bn(with_std=true)", "softmax+bn"),
        ("bn(beta=0.5,with_std=false,eps=1e-5)", "softmax+bn(beta=0.5,with_std=false)"),
        (
            "bn(0.5,1e-5,running,false,false)",
            "softmax+bn(beta=0.5,statistics=running,with_std=false)",
        ),
    ],
)
def test_it_is_written_without_eps(text: str, canonical: str) -> None:
    spec = parse(text)
    assert str(spec) == canonical
    assert parse(canonical) == spec


def test_an_eps_that_nothing_reads_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"eps is 0\.1 with with_std=false.*leave eps out"):
        parse("bn(eps=0.1,with_std=false)")
    with pytest.raises(SpecError, match=r"with_std is 0, expected True or False"):
        Batch(with_std=0)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="with_std"):
        parse("bn(with_std=0)")


def test_running_statistics_are_a_mean_alone() -> None:
    names = [p.name for p in parse("bn(statistics=running,with_std=false)").parameters()]
    assert names == ["mean"]
    names = [p.name for p in parse("bn(param,statistics=running)").parameters()]
    assert names == ["beta", "mean", "var"]


@pytest.mark.parametrize("kernel", ["softmax", "gaussian(0.3)"])
def test_causal_refuses_it_as_with_division(kernel: str) -> None:
    for statistics in ("sequence", "batch"):
        with pytest.raises(UnsupportedError, match="the future leaks"):
            parse(f"causal+{kernel}+bn(statistics={statistics},with_std=false)")
    assert parse("causal+bn(statistics=prefix,with_std=false)").prefix


def test_latex_divides_by_nothing() -> None:
    text = parse("bn(beta=0.5,with_std=false)").latex()
    assert r"T(x) = x - 0.5\,\mu" in text
    assert r"\sigma" not in text
    assert r"q_i' = q_i - 0.5\,\mu" in text
    assert "recentred, not divided by the deviation (recalled from the paper, not verified)" in text
    text = parse("bn(statistics=running,with_std=false)").latex()
    assert r"\mu \text{ given by the call}" in text
    assert r"\sigma" not in parse("causal+bn(statistics=prefix,with_std=false)").latex()
    assert r"\sigma" in parse("bn").latex()


def test_it_is_derived_from_a_layer() -> None:
    derivation = pdcore.derive("batch_norm", with_std=False)
    assert derivation.spec == AttentionSpec(normalization=BARE)
    assert "Nothing is divided: T(x) = x - beta mu." in str(derivation)
    assert any(step.startswith("recentre: ") for step in derivation.plan.steps)
    assert pdcore.derive("batch_norm(with_std=false)").spec == derivation.spec
