"""The program around the commands: help, errors as JSON and in options' words, completion, what is not imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import paretofuse as pf
from paretofuse.cli.program import COMMANDS
from paretofuse.cli.running import in_options
from tests.support.command import call


def test_bare_program_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert (code, err) == (0, "")
    assert out.startswith("usage: paretofuse")
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_neither_torch_nor_numpy(words: list[str]) -> None:
    script = (
        "import sys\nfrom paretofuse.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'numpy', 'transformers', 'argcomplete')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "code", "kind", "message"),
    [
        (["info", "{tmp}/none", "--json"], 1, "StoreError", "no such directory"),
        (["merge", "{tmp}/none", "--preference", "a=1", "-o", "{tmp}/o", "--json"], 1, "StoreError", "none"),
        (["sweep", "s", "--evaluate", "no_such_module:f", "-o", "f", "--json"], 1, "ModuleNotFoundError", "no_such"),
        (["merge", "s", "--json"], 2, "usage", "--preference"),
        (["dance", "--json"], 2, "usage", "dance"),
        (["doctor", "--jsn", "--json"], 2, "usage", "--jsn"),
    ],
)  # fmt: skip
def test_errors_as_json(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    code: int,
    kind: str,
    message: str,
) -> None:
    got, out, err = call(capsys, *(word.format(tmp=tmp_path) for word in words))
    assert (got, err) == (code, "")
    error = json.loads(out)["error"]
    assert error["type"] == kind
    assert message in error["message"]


def test_interruption_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["info"], "run", interrupted)
    code, out, err = call(capsys, "info", "s", "--json")
    assert (code, err) == (130, "")
    assert json.loads(out)["error"]["type"] == "KeyboardInterrupt"
    code, out, err = call(capsys, "info", "s")
    assert (code, out, err) == (130, "", "paretofuse: interrupted\n")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "overflows F16; pass dtype=torch.bfloat16 or float32",
            "overflows F16; pass --dtype bfloat16 or float32",
        ),
        ("pass delta_dtype=torch.bfloat16 or", "pass --delta-dtype bfloat16 or"),
        ("declare it a head: heads=['score']", "declare it a head: --head score"),
        ("got heads=['a.b', 'c'], but", "got --head a.b, c, but"),
        ("does not have; pass module= to pf.load, or", "does not have; pass --module, or"),
        ("got log='a b.csv', which", "got --log a b.csv, which"),
        ("choose another place, or pass force=True", "choose another place, or pass --force"),
        ("got steps=0, expected", "got --steps 0, expected"),
        ("got preferences_per_step=-1, expected", "got --preferences-per-step -1, expected"),
        ("got out='f.csv', which is there", "got --output f.csv, which is there"),
        ("is better, pass maximize=False; else", "is better, pass --minimize; else"),
        ("is better, pass maximize=True; else", "is better, leave --minimize out; else"),
        ("a safe_serialization=True b", "a safe_serialization=True b"),
        ("nothing to say", "nothing to say"),
    ],
)
def test_messages_name_options(message: str, expected: str) -> None:
    names = ["dtype", "delta_dtype", "head", "module", "log", "steps", "preferences_per_step", "force"]
    assert in_options(message, names) == expected


def test_a_wrong_head_names_the_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for name in ("base", "a"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    code, _, err = call(
        capsys, "stack", f"{tmp_path}/base.safetensors", "--expert", f"a={tmp_path}/a.safetensors",
        "-o", f"{tmp_path}/s", "--head", "scorer",
    )  # fmt: skip
    assert code == 1
    assert "--head scorer" in err
    assert "heads=" not in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    code, out, err = call(capsys, "completion", shell)
    assert (code, err) == (0, "")
    assert "paretofuse" in out
    assert "_ARGCOMPLETE" in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="this system has no bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("paretofuse me", {"merge"}),
        ("paretofuse stack base --rou", {"--route"}),
        ("paretofuse stack base --route m", {"mlp", "module"}),
    ],
)
def test_bash_completes(tmp_path: Path, line: str, expected: set[str]) -> None:
    """The printed script, read by a real bash, asks the real program."""
    program = tmp_path / "paretofuse"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m paretofuse "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(paretofuse completion bash)"\n'
        f'COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9; COMP_WORDS=($COMP_LINE)\n'
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n_python_argcomplete paretofuse\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, timeout=120, env=path
    )
    assert {word.strip() for word in done.stdout.split()} == expected


def test_an_error_is_one_line_whatever_was_raised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, shown in (
        (ValueError("got this,\n  and that\n"), "got this, and that"),
        (
            TypeError("merge(): wrong arguments\n\nInvoked with: all the weights"),
            "TypeError: merge(): wrong arguments",
        ),
        (RuntimeError(""), "RuntimeError"),
    ):

        def fails(_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(COMMANDS["info"], "run", fails)
        code, out, err = call(capsys, "info", "s")
        assert (code, out) == (1, "")
        assert (
            err.removesuffix("\n").removesuffix(" (--traceback shows where)") == f"paretofuse: error: {shown}"
        )


@pytest.mark.parametrize("threads", [1025, 10**18, 10**30])
@pytest.mark.parametrize("command", ["merge", "stack", "adapter"])
def test_more_threads_than_there_can_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, threads: int
) -> None:
    tensors = {name: {"w.weight": torch.full((2, 2), number)} for number, name in enumerate(("base", "a"), 1)}
    for name, own in tensors.items():
        save_file({key: value.float() for key, value in own.items()}, tmp_path / f"{name}.safetensors")
    pf.stack(tmp_path / "base.safetensors", {"a": tmp_path / "a.safetensors"}).save(tmp_path / "s")
    words = {
        "merge": [tmp_path / "s", "--preference", "a=1"],
        "adapter": [tmp_path / "s", "--preference", "a=1"],
        "stack": [tmp_path / "base.safetensors", "--expert", f"a={tmp_path}/a.safetensors"],
    }[command]
    code, out, err = call(capsys, command, *words, "-o", tmp_path / "out", "--threads", str(threads))
    assert (code, out) == (2, "")
    assert err.endswith(f"argument --threads: got '{threads}', expected a whole number of 1 to 1024\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("port", ["65536", "-1", "http", "1.5"])
def test_a_port_that_there_cannot_be(capsys: pytest.CaptureFixture[str], port: str) -> None:
    code, _, err = call(capsys, "serve", "s", "--port", port)
    assert code == 2
    assert f"got '{port}', expected a port, 1 to 65535" in err
