"""Test what the command line prints, on which stream, and its exit codes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import pdcore
from pdcore.cli.commands import app
from pdcore.errors import Exit
from pdcore.plugins import registry as plugins

RNG = np.random.default_rng(0)
QKV: dict[str, Any] = {
    name: RNG.standard_normal((2, 4, 6, 8)).astype(np.float32) for name in ("q", "k", "v")
}


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pdcore")


def process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pdcore", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.savez(tmp_path / "in.npz", **QKV)
    return tmp_path / "in.npz"


# --- attend -----------------------------------------------------------------------------------


def test_attend_is_attention(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    result = run("attend", "bn+sh(1,1,2,2)", source, "-o", out, "--lse")
    assert result.exit_code == 0, result.stderr
    assert "wrote" in result.stdout
    assert "(2, 4, 6, 8) float32" in result.stdout
    expected = pdcore.attention(**QKV, spec="bn+sh(1,1,2,2)", return_lse=True)
    with np.load(out, allow_pickle=False) as written:
        assert set(written) == {"out", "lse"}
        np.testing.assert_array_equal(written["out"], expected[0])
        np.testing.assert_array_equal(written["lse"], expected[1])


def test_attend_takes_packed_sequences(tmp_path: Path) -> None:
    ids = np.array([[0, 0, 1, 1, 1, -1]] * 2)
    np.savez(tmp_path / "in.npz", **QKV, segments=ids)
    out = tmp_path / "out.npz"
    assert run("attend", "bn", tmp_path / "in.npz", "-o", out).exit_code == 0
    with np.load(out, allow_pickle=False) as written:
        expected = pdcore.attention(**QKV, spec="bn", segments=ids)
        np.testing.assert_array_equal(written["out"], expected)
    np.savez(tmp_path / "in.npz", **QKV, segments=ids[:, [0, 2, 1, 3, 4, 5]])
    refused = run("attend", "bn", tmp_path / "in.npz", "-o", out, "--force")
    assert refused.exit_code != 0
    assert "in.npz: segments: the id 0" in refused.stderr


def test_attend_takes_everything_a_file_may_hold(tmp_path: Path) -> None:
    call = {
        "mask": RNG.random((6, 6)) < 0.8,
        "key_mask": np.arange(6) < np.array([[6], [4]]),
        "bias": RNG.standard_normal((6, 6)).astype(np.float32),
        "offset": np.array([1, 2]),
    }
    beta = np.array([0.5, 1.0, 1.5, 2.0], np.float32)
    np.savez(tmp_path / "in.npz", **QKV, **call, **{"params.beta": beta})
    spec = "bn(beta=param)+sparse(3,2)"
    result = run("attend", spec, tmp_path / "in.npz", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.stderr
    written = load_file(tmp_path / "out.safetensors")
    assert set(written) == {"out"}
    expected = pdcore.attention(**QKV, **call, spec=spec, params={"beta": beta})
    np.testing.assert_array_equal(written["out"], expected)


@pytest.mark.parametrize("offset", ["end", "-2", "3"])
def test_attend_offset(source: Path, tmp_path: Path, offset: str) -> None:
    out = tmp_path / "out.npz"
    assert run("attend", "causal", source, "-o", out, "--offset", offset).exit_code == 0
    value: Any = offset if offset == "end" else int(offset)
    with np.load(out) as written:
        np.testing.assert_array_equal(
            written["out"], pdcore.attention(**QKV, spec="causal", offset=value)
        )


def test_attend_json(source: Path, tmp_path: Path) -> None:
    result = run("attend", "softmax", source, "-o", tmp_path / "out.npz", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    printed = json.loads(result.stdout)
    assert printed["backend"] == "numpy"
    assert printed["arrays"] == {"out": {"shape": [2, 4, 6, 8], "dtype": "float32"}}
    assert printed["pieces"] == 1
    assert printed["seconds"] >= 0


def test_attend_in_bfloat16(tmp_path: Path) -> None:
    import ml_dtypes
    from safetensors.numpy import save_file

    low = {n: a.astype(ml_dtypes.bfloat16) for n, a in QKV.items()}
    save_file(low, tmp_path / "in.safetensors")
    refused = run("attend", "bn", tmp_path / "in.safetensors", "-o", tmp_path / "out.npz")
    assert refused.exit_code == Exit.INPUT
    assert "cannot hold bfloat16, use .safetensors" in refused.stderr
    out = tmp_path / "out.safetensors"
    result = run("attend", "bn", tmp_path / "in.safetensors", "-o", out)
    assert result.exit_code == 0, result.stderr
    written = load_file(out)["out"]
    assert written.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(written, pdcore.attention(**low, spec="bn"))


def test_attend_refuses_to_overwrite(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")
    result = run("attend", "softmax", source, "-o", out)
    assert result.exit_code == Exit.OUTPUT
    assert "exists; --force replaces it" in result.stderr
    assert out.read_bytes() == b"precious"
    assert run("attend", "softmax", source, "-o", out, "--force").exit_code == 0
    assert run("attend", "softmax", source, "-o", source).exit_code == Exit.OUTPUT


WRONG_CALLS: dict[str, tuple[list[str], dict[str, Any], Exit, str]] = {
    "unknown spec word": (
        ["sofmax"],
        {},
        Exit.USAGE,
        "did you mean 'softmax'? known: alibi, batch, bn",
    ),
    "unknown spec argument": (["bn(epsilon=1)"], {}, Exit.USAGE, "did you mean 'eps'?"),
    "unreadable spec": (["bn("], {}, Exit.USAGE, "cannot read it at column"),
    "two words for one axis": (["bn+identity"], {}, Exit.USAGE, "both set the normalization"),
    "a leak": (["causal+bn"], {}, Exit.UNSUPPORTED, "the future leaks"),
    "prefix of another kernel": (
        ["cosine+bn(statistics=prefix)"],
        {},
        Exit.UNSUPPORTED,
        "needs a kernel of inner products",
    ),
    "scales of other heads": (["sh(1,2)"], {}, Exit.INPUT, "2 scales"),
    "runs of other heads": (["sh(1*16,2*16)"], {}, Exit.INPUT, "32 scales"),
    "a missing parameter": (["bn(beta=param)"], {}, Exit.INPUT, "beta"),
    "an unknown parameter": (
        ["softmax"],
        {"params.beta": np.ones(4, np.float32)},
        Exit.INPUT,
        "beta",
    ),
    "a bias without a log": (
        ["linear"],
        {"bias": np.zeros((6, 6), np.float32)},
        Exit.UNSUPPORTED,
        "bias",
    ),
    "shapes that do not fit": (["softmax"], {"v": QKV["v"][:, :, :5]}, Exit.INPUT, "v: "),
    "mixed dtypes": (["softmax"], {"k": QKV["k"].astype(float)}, Exit.INPUT, "k: got"),
    "a mask that does not fit": (["softmax"], {"mask": np.ones((5, 5), bool)}, Exit.INPUT, "mask"),
    "too few axes": (["softmax"], {"q": QKV["q"][0, 0]}, Exit.INPUT, "q: "),
    "an unknown array": (["softmax"], {"keymask": np.ones(3, bool)}, Exit.INPUT, "'key_mask'"),
    "an unknown backend": (
        ["softmax", "--backend", "nunpy"],
        {},
        Exit.USAGE,
        "unknown backend 'nunpy'; did you",
    ),
    "no backend": (["softmax", "--backend", ""], {}, Exit.USAGE, "unknown backend ''"),
    "an unknown device": (["softmax", "--device", "tpu"], {}, Exit.NO_BACKEND, "device tpu"),
    "a device that the backend lacks": (
        ["softmax", "--backend", "numpy:cuda"],
        {},
        Exit.UNSUPPORTED,
        "device cuda",
    ),
    "an offset that is no number": (
        ["causal", "--offset", "last"],
        {},
        Exit.USAGE,
        "expected a whole number or 'end'",
    ),
    "an offset twice": (
        ["causal", "--offset", "1"],
        {"offset": np.array(2)},
        Exit.INPUT,
        "has an offset already",
    ),
    "an unknown option": (["softmax", "--lsee"], {}, Exit.USAGE, "--lsee"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls_say_why(tmp_path: Path, case: str) -> None:
    arguments, changed, code, message = WRONG_CALLS[case]
    np.savez(tmp_path / "in.npz", **(QKV | changed))
    out = tmp_path / "out.npz"
    result = run("attend", *arguments, tmp_path / "in.npz", "-o", out)
    text = " ".join(result.stderr.replace("│", " ").split())
    assert message in text, text
    assert result.exit_code == code
    assert result.stdout == ""
    assert os.listdir(tmp_path) == ["in.npz"]


def test_a_wrong_call_with_json_has_its_error_on_stdout(source: Path, tmp_path: Path) -> None:
    result = run("attend", "causal+bn", source, "-o", tmp_path / "out.npz", "--json")
    assert result.exit_code == Exit.UNSUPPORTED
    printed = json.loads(result.stdout)
    assert printed["exit_code"] == Exit.UNSUPPORTED
    assert printed["error"]["kind"] == "UnsupportedError"
    assert "the future leaks" in printed["error"]["message"]


def test_a_missing_input_and_a_bad_output(tmp_path: Path, source: Path) -> None:
    result = run("attend", "softmax", tmp_path / "none.npz", "-o", tmp_path / "out.npz")
    assert result.exit_code == Exit.INPUT
    assert "No such file" in result.stderr
    result = run("attend", "softmax", source, "-o", tmp_path / "out.npy")
    assert result.exit_code == Exit.INPUT
    assert "expected one of .npz, .safetensors" in result.stderr
    result = run("attend", "softmax", source, "-o", tmp_path / "none" / "out.npz")
    assert result.exit_code == Exit.OUTPUT


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.skipif(os.name == "nt", reason="POSIX only")
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    long = {n: RNG.standard_normal((1, 8, 32768, 64)).astype(np.float32) for n in ("q", "k", "v")}
    np.savez(tmp_path / "in.npz", **long)
    command = ["attend", "softmax", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "pdcore", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background processes, and their children, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as started:
        try:
            # The temporary file exists from the moment the work begins.
            for _ in range(600):
                if len(os.listdir(tmp_path)) > 1:
                    break
                time.sleep(0.05)
            assert any(name.endswith(".part") for name in os.listdir(tmp_path))
            started.send_signal(number)
            stdout, stderr = started.communicate(timeout=60)
        finally:
            started.kill()
    assert started.returncode == code, stderr
    assert json.loads(stdout)["exit_code"] == code
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["in.npz"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX only")
def test_a_bar_appears_on_a_terminal_and_only_after_a_while() -> None:
    code = (
        "import time, pdcore.cli.reporting as r\n"
        "with r.progress('attention', patience={patience}) as done:\n"
        "    for share in (0.25, 0.5, 0.75): time.sleep(0.2); done(share)\n"
    )
    for patience, shown in (("0.1", True), ("60", False)):
        text = on_a_terminal(code.format(patience=patience))
        assert ("attention" in text) is shown, text
        assert ("left:" in text) is shown
    # Without a terminal nobody would see a bar: the steps with names are lines.
    silent = subprocess.run(
        [sys.executable, "-c", code.format(patience="0.1")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert silent.stderr == silent.stdout == ""
    named = code.format(patience="0.1").replace("done(share)", "done(share, 'bn')")
    assert "bn" in on_a_terminal(named)
    lines = subprocess.run(
        [sys.executable, "-c", named], capture_output=True, text=True, check=True
    )
    assert lines.stdout == ""
    assert lines.stderr.splitlines()[0] == "attention: 25%, bn"


def on_a_terminal(code: str) -> str:
    """Run code whose stderr is a terminal, and return what the terminal shows."""
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert child.wait(timeout=60) == 0
    return shown.decode()


# --- the other commands -----------------------------------------------------------------------


def test_unknown_commands_name_the_nearest() -> None:
    result = run("atend")
    assert result.exit_code == Exit.USAGE
    assert "unknown command 'atend'; did you mean 'attend'?" in result.stderr
    assert "backends" in result.stderr


@pytest.mark.parametrize(
    "command",
    ["attend", "demo", "backends", "explain", "specs", "derive", "bench", "report", "new-backend"],
)
def test_every_command_has_help_and_json(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_the_help_fills_every_paragraph() -> None:
    helped = [line.strip() for line in run("report", "--help").stdout.splitlines()]
    first = next(n for n, line in enumerate(helped) if line.startswith("Two: says what"))
    paragraph = helped[first : helped.index("", first)]
    assert len(paragraph) >= 3
    for line, after in itertools.pairwise(paragraph):
        assert len(line) + 1 + len(after.split()[0]) > 76  # else that word would be on this line


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (("bench", "numpy"), "pytest"),
        (("conform", "numpy"), "pytest"),
        (("new-backend", "mine"), "copier"),
    ],
)
def test_a_missing_extra_is_json_too(
    arguments: tuple[str, ...], package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("pdcore_conformance")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, "--json")
    assert result.exit_code == Exit.MISSING
    printed = json.loads(result.stdout)
    message = f"{package} is not installed: pip install 'pdcore[conformance]'"
    assert printed["error"] == {"kind": "ModuleNotFoundError", "message": message}
    assert printed["exit_code"] == Exit.MISSING
    assert message in result.stderr


def test_a_result_before_the_failure_is_the_only_json() -> None:
    result = run(
        "explain",
        "softmax",
        "--shape",
        "2,4,6,8",
        "--library",
        "torch",
        "--backend",
        "numpy",
        "--device",
        "cuda",
        "--json",
    )
    assert result.exit_code == Exit.NO_BACKEND
    printed = json.loads(result.stdout)
    assert "error" not in printed
    assert "no backend can run it" in result.stderr


def test_the_help_and_the_documentation_give_the_exit_codes() -> None:
    helped = " ".join(run("--help").stdout.split())
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for code in Exit:
        assert f"{int(code)} {code.meaning}" in helped
        assert f"| {int(code)} | {code.meaning} |" in page


def test_version() -> None:
    assert run("--version").stdout.strip() == f"pdcore {pdcore.__version__}"


def test_backends() -> None:
    result = run("backends", "--json")
    assert result.exit_code == 0
    listed = {b["name"]: b for b in json.loads(result.stdout)["backends"]}
    assert listed["numpy"]["available"] is True
    assert listed["numpy"]["reason"] is None
    assert listed["numpy"]["versions"]["numpy"] == np.__version__
    assert listed["numpy"]["capabilities"]["batch"] == "full"
    assert "numpy" in run("backends").stdout


def test_backends_that_are_missing_or_broken_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    info = pdcore.BackendInfo(
        name="absent",
        load="absent.backend:Backend",
        library="absent",
        requires=("absent",),
        install="pip install absent",
    )
    broken = plugins.BrokenPlugin("some-plugin", "1.0", ImportError("no libfoo"))
    plugins.discover()
    monkeypatch.setitem(plugins.broken, "bad", broken)
    plugins.register_backend(info)
    try:
        listed = {b["name"]: b for b in json.loads(run("backends", "--json").stdout)["backends"]}
        assert listed["absent"]["available"] is False
        assert listed["absent"]["reason"] == "not installed: pip install absent"
        assert "ImportError: no libfoo (distribution some-plugin 1.0)" in listed["bad"]["reason"]
        assert "absent" in run("backends").stdout
        result = run("explain", "softmax", "--shape", "1,2,3,4", "--backend", "absent")
        assert result.exit_code == Exit.NO_BACKEND
        assert "pip install absent" in result.stdout
    finally:
        plugins.unregister_backend("absent")


def test_specs() -> None:
    result = run("specs", "--json")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert {p["name"] for p in printed["presets"]} == set(pdcore.PRESETS)
    words = {w["word"]: w for w in printed["words"]}
    assert words["softmax"]["aliases"] == ["exponential"]
    beta = words["bn"]["arguments"][0]
    assert beta == {"name": "beta", "expects": "float or str", "required": False, "default": 1.0}
    assert words["gaussian"]["arguments"][0]["required"] is True
    for word in ("sh", "causal", "sparse", "h"):
        assert words[word]["meaning"]
    text = run("specs").stdout
    assert "gaussian(gamma)" in text
    assert "softmax" in text


def test_every_listed_word_parses() -> None:
    values = {
        "gamma": "0.5",
        "scales": "1,2",
        "left": "3",
        "right": "inf",
        "normaliser": "count",
        "height": "4",
        "width": "4",
        "reach": "2",
        "count": "3",
    }
    for word in json.loads(run("specs", "--json").stdout)["words"]:
        arguments = [values[a["name"]] for a in word["arguments"] if a["required"]]
        for name in (word["word"], *word["aliases"]):
            pdcore.parse(f"{name}({','.join(arguments)})" if arguments else name)


def test_explain() -> None:
    arguments = ("explain", "bn+sh(1,1,2,2)", "--shape", "2,8,1024,64", "--key-shape", "2,4,512,64")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "fold" in result.stdout
    assert "backend: numpy" in result.stdout
    assert "align" not in result.stdout
    assert r"\begin{align*}" in run(*arguments, "--latex").stdout
    printed = json.loads(run(*arguments, "--json").stdout)
    assert printed["backend"] == "numpy"
    assert printed["request"]["k"] == [2, 4, 512, 64]
    assert printed["plan"]["groups"][1]["scale"] == 2
    assert printed["latex"].startswith(r"\begin{align*}")


def test_explain_shows_what_a_mask_costs() -> None:
    base = ("explain", "linear", "--shape", "1,8,64,16")
    assert "O(N + M)" in run(*base).stdout
    masked = run(*base, "--with", "mask,key_mask")
    assert "O(N M)" in masked.stdout
    assert "mask (1, 8, 64, 64), key_mask (1, 64)" in masked.stdout


def test_derive_gives_the_steps_as_text_latex_and_data() -> None:
    base = ("derive", "batch_norm", "--kernel", "gaussian(0.3)")
    text = run(*base).stdout
    assert "1. The layer" in text
    assert "5. The plan" in text
    assert run(*base, "--latex").stdout.startswith(r"\begin{align*}")
    assert json.loads(run(*base, "--json").stdout)["spec"] == "gaussian(gamma=0.3)+bn"
    printed = json.loads(run("derive", "conv2d(14, 14, size=5)", "--json").stdout)
    assert (printed["layer"], printed["spec"]) == (
        "conv2d",
        "softmax+conv2d(height=14,width=14,size=5)",
    )
    for layer, says in (
        ("mixture_norm(compnents=3)", "did you mean 'components'?"),
        ("conv2d", "height and width must be given"),
        ("bn", "did you mean 'batch_norm'?"),
    ):
        wrong = run("derive", layer)
        assert wrong.exit_code == Exit.USAGE
        assert says in wrong.stderr
    wrong = run("derive", "batchnorm")
    assert wrong.exit_code == Exit.USAGE
    assert "did you mean 'batch_norm'?" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("softmax", "--shape", "8,64"), Exit.USAGE, "at least three whole numbers"),
        (("softmax", "--shape", "1,8,x,64"), Exit.USAGE, "at least three whole numbers"),
        (("softmax", "--shape", "1,8,4,64", "--key-shape", "1,3,4,64"), Exit.USAGE, "divides q's"),
        (("softmax", "--shape", "1,8,4,64", "--dtype", "float23"), Exit.USAGE, "did you mean"),
        (("softmax", "--shape", "1,8,4,64", "--library", "numpi"), Exit.USAGE, "'numpy'?"),
        (("softmax", "--shape", "1,8,4,64", "--with", "musk"), Exit.USAGE, "'mask'?"),
        (("softmax", "--shape", "1,8,4,64", "--offset", "edn"), Exit.USAGE, "'end'?"),
        (("softmax", "--shape", "1,8,4,64", "-b", "torhc"), Exit.USAGE, "unknown backend"),
        (("sh(1,2)", "--shape", "1,8,4,64"), Exit.USAGE, "2 scales"),
        (("softmx", "--shape", "1,8,4,64"), Exit.USAGE, "did you mean 'softmax'?"),
        (("softmax", "--shape", "1,8,4,64", "-b", "numpy:cuda"), Exit.NO_BACKEND, "no backend"),
    ],
)
def test_explain_refusals(arguments: tuple[str, ...], code: Exit, message: str) -> None:
    result = run("explain", *arguments)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == code


# --- processes --------------------------------------------------------------------------------


def test_module_and_script_are_the_same(source: Path, tmp_path: Path) -> None:
    done = process("attend", "bn", source, "-o", tmp_path / "out.npz", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["spec"] == "softmax+bn"
    assert process("attend", "bn", source, "-o", tmp_path / "out.npz").returncode == Exit.OUTPUT
    assert process("nothing").returncode == Exit.USAGE


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, package: str) -> None:
    hook = f"import sys; sys.modules[{package!r}] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hook, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = process("specs", env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == Exit.MISSING
    assert done.stdout == ""
    assert done.stderr == f"pdcore: {package} is not installed: pip install 'pdcore[cli]'\n"


def test_without_matplotlib_only_the_demo_is_missing(tmp_path: Path) -> None:
    hook = "import sys; sys.modules['matplotlib'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hook, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = process("demo", "--json", cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == Exit.MISSING
    assert "pip install 'pdcore[cli]'" in json.loads(done.stdout)["error"]["message"]
    assert process("specs", env={**os.environ, "PYTHONPATH": path}).returncode == 0


def test_import_pdcore_loads_none_of_it() -> None:
    code = (
        "import sys, pdcore, pdcore.cli\n"
        "print(sorted({'typer', 'rich', 'scipy', 'matplotlib', 'safetensors', 'ml_dtypes'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
