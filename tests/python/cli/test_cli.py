"""The command line, as a process and in process: results, wrong inputs, exit codes, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import paretofuse
from paretofuse.cli import main
from paretofuse.cli.program import COMMANDS
from paretofuse.engine.merging import native
from tests.support.command import call, run

EXPERTS = ("cola", "sst2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base.safetensors and an expert's file for each objective."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.mlp.weight": (5, 3), "a.mlp.bias": (5,), "norm.weight": (3,), "classifier.weight": (2, 3)}
    for name in ("base", *EXPERTS):
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        safetensors.torch.save_file(tensors, root / f"{name}.safetensors")
    return root


def stack_arguments(models: Path, out: Path) -> list[str]:
    experts = [word for name in EXPERTS for word in ("--expert", f"{name}={models / name}.safetensors")]
    return ["stack", f"{models / 'base'}.safetensors", *experts, "-o", str(out)]


@pytest.fixture(scope="module")
def store(models: Path) -> Path:
    assert main([*stack_arguments(models, models / "the.store"), "--head", "classifier.*", "--quiet"]) == 0
    return models / "the.store"


def test_version_and_help() -> None:
    done = run(["--version"])
    assert (done.returncode, done.stdout.strip()) == (0, f"paretofuse {paretofuse.__version__}")
    done = run(["--help"])
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_help_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert "example:\n  " in out
    assert f"paretofuse {command}" in out.partition("example:")[2]


def test_stack_merge_info(
    capsys: pytest.CaptureFixture[str], models: Path, store: Path, tmp_path: Path
) -> None:
    code, out, _ = call(capsys, "info", store, "--verify", "--threads", 1, "--json")
    info = json.loads(out)
    assert code == 0
    assert info["objectives"] == list(EXPERTS)
    assert info["verified"] is True
    assert info["parameters"]["routed"] == 5 * 3 + 5 + 3
    assert set(info["heads"]) == set(EXPERTS)

    code, out, _ = call(
        capsys, "merge", store, "--preference", "sst2=1", "--head", "sst2", "-o", tmp_path / "out", "--json"
    )
    merge = json.loads(out)
    assert code == 0
    assert merge["path"] == str(tmp_path / "out")
    assert merge["tensors"] == 4
    assert merge["isa"] == native.chosen_isa()
    # Identity routers: a one-hot preference is that expert, up to the rounding of base + (expert - base).
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    expert = safetensors.torch.load_file(models / "sst2.safetensors")
    assert set(merged) == set(expert)
    for name, tensor in expert.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)


def test_texts_for_people(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path) -> None:
    code, out, err = call(capsys, "info", store)
    assert (code, err) == (0, "")
    assert "cola, sst2" in out
    assert "23 routed" in out
    code, out, err = call(
        capsys, "merge", store, "--preference", "cola=0.5,sst2=0.5", "-o", tmp_path / "x.safetensors"
    )
    assert (code, err) == (0, "")
    assert out.startswith(str(tmp_path / "x.safetensors"))


def test_merge_is_a_process_without_torch(store: Path, tmp_path: Path) -> None:
    script = "import sys; from paretofuse.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules)"
    words = [
        "merge",
        str(store),
        "--preference",
        "cola=0.25,sst2=0.75",
        "-o",
        str(tmp_path / "out"),
        "--quiet",
    ]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stderr == ""
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_options_of_stack(capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path) -> None:
    words = [
        "--route",
        "tensor",
        "--init",
        "constant",
        "--static-weight",
        "0.4",
        "--dtype",
        "bfloat16",
        "--delta-dtype",
        "float16",
        "--json",
    ]
    code, out, _ = call(capsys, *stack_arguments(models, tmp_path / "s"), *words)
    document = json.loads(out)
    assert code == 0
    assert document["groups"] == 4
    assert document["init"] == "constant"
    assert document["static_weight"] == 0.4
    assert document["dtypes"] == ["BF16"]
    assert document["delta_dtypes"] == ["F16"]
    assert document["notes"]  # that float32 became bfloat16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "{store}", "--preference", "cola=0.5,sst2=0.6", "-o", "{tmp}/o"], "sum 1.1"),
        (["merge", "{store}", "--preference", "cola=0.5", "-o", "{tmp}/o"], "give 'sst2' as well"),
        (["merge", "{store}", "--preference", "mrpc=1", "-o", "{tmp}/o"], "'mrpc'"),
        (["merge", "{store}", "--preference", "cola=-1,sst2=2", "-o", "{tmp}/o"], ">= 0"),
        (["merge", "{store}", "--preference", "cola=nan,sst2=1", "-o", "{tmp}/o"], "nan"),
        (["merge", "{store}", "--preference", "cola=1", "--head", "x", "-o", "{tmp}/o"], "'x'"),
        (["merge", "{store}", "--preference", "cola=1", "--isa", "sse9", "-o", "{tmp}/o"], "sse9"),
        (["merge", "{store}", "--preference", "cola=1", "-o", "{store}"], "another file"),
        (["merge", "{tmp}/none", "--preference", "cola=1", "-o", "{tmp}/o"], "is not a store"),
        (["merge", "{store}", "--preference", "cola=1", "-o", "/proc/none/out"], "/proc"),
        (["info", "{tmp}"], "is not a store"),
        (["info", "{tmp}/none"], "no such directory"),
        (["stack", "{tmp}/none", "--expert", "a={tmp}/x", "-o", "{tmp}/s"], "none"),
        (["sweep", "{store}", "--evaluate", "no_such_module:f", "-o", "{tmp}/f.csv"], "no_such_module"),
        (["sweep", "{store}", "--evaluate", "json:no_such_name", "-o", "{tmp}/f.csv"], "no_such_name"),
        (["sweep", "{store}", "--evaluate", "json:__name__", "-o", "{tmp}/f.csv"], "expected a function"),
    ],
)  # fmt: skip
def test_work_that_fails(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    arguments = [word.format(store=store, tmp=tmp_path) for word in words]
    code, out, err = call(capsys, *arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("paretofuse: error: ")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dance"], "invalid choice"),
        (["merge", "s", "-o", "o"], "--preference"),
        (["merge", "s", "--preference", "cola", "-o", "o"], "expected NAME=NUMBER"),
        (["merge", "s", "--preference", "cola=much", "-o", "o"], "expected NAME=NUMBER"),
        (["merge", "s", "--preference", "", "-o", "o"], "expected NAME=NUMBER"),
        (["merge", "s", "--preference", "a=0.5,a=0.5", "-o", "o"], "twice"),
        (["merge", "s", "--preference", "a=1"], "-o"),
        (["merge", "s", "--preference", "a=1", "-o", "o", "--threads", "0"], "at least 1"),
        (["merge", "s", "--preference", "a=1", "-o", "o", "--threads", "many"], "at least 1"),
        (["stack", "b", "-o", "o"], "--expert"),
        (["stack", "b", "--expert", "cola", "-o", "o"], "expected NAME=PATH"),
        (["stack", "b", "--expert", "=x", "-o", "o"], "expected NAME=PATH"),
        (["stack", "b", "--expert", "a=x", "--expert", "a=y", "-o", "o"], "twice"),
        (["stack", "b", "--expert", "a=x", "-o", "o", "--route", "magic"], "invalid choice"),
        (["stack", "b", "--expert", "a=x", "-o", "o", "--dtype", "int8"], "invalid choice"),
        (["stack", "b", "--expert", "a=x", "-o", "o", "--static-weight", "heavy"], "invalid float"),
        (["stack", "b", "--expert", "a=x", "-o", "o", "--delta-dtype", "int8"], "invalid choice"),
        (["sweep", "s", "--evaluate", "module", "-o", "o"], "expected MODULE:FUNCTION"),
        (["info"], "STORE"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_traceback_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = call(capsys, "info", tmp_path, "--traceback")
    assert code == 1
    assert "Traceback" in err


def test_a_damaged_store_fails_verification(
    capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path
) -> None:
    assert call(capsys, *stack_arguments(models, tmp_path / "s"))[0] == 0
    file = tmp_path / "s" / "experts" / "cola.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert call(capsys, "info", tmp_path / "s")[0] == 0
    code, out, err = call(capsys, "info", tmp_path / "s", "--verify")
    assert (code, out) == (1, "")
    assert "cola.safetensors" in err
    assert "checksum" in err


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARETOFUSE_ISA", raising=False)
    code, out, _ = call(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["instruction_sets"] == native.instruction_sets()
    assert report["chosen"] == native.chosen_isa()
    assert report["versions"]["torch"]
    monkeypatch.setenv("PARETOFUSE_ISA", "scalar")
    code, out, _ = call(capsys, "doctor", "--full")
    assert code == 0
    assert "scalar            chosen" in out
    assert "torch CUDA" in out
    monkeypatch.setenv("PARETOFUSE_ISA", "magic")
    code, out, _ = call(capsys, "doctor")
    assert code == 1
    assert "problem: " in out
    assert "magic" in out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 141), (["sweep", "--help"], 141), (["doctor"], 141), (["info", "{store}"], 141),
        (["info", "{store}", "--json"], 141),
        (["merge", "{store}", "--preference", "cola=1", "-o", "{tmp}/o"], 141), (["info", "{tmp}/none"], 1),
    ],
)  # fmt: skip
def test_a_pipe_that_nobody_reads(store: Path, tmp_path: Path, words: list[str], code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # before the first word, as a `head` that has read enough
    command = [
        sys.executable,
        "-m",
        "paretofuse",
        *(word.format(store=store, tmp=tmp_path) for word in words),
    ]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False, env=buffered
        )
    finally:
        os.close(writing)
    assert done.returncode == code
    if code == 141:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith("paretofuse: error: ")
        assert done.stderr.count("\n") == 1
    assert (tmp_path / "o").is_dir() == (words[0] == "merge")  # the work is done all the same


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_stdout_on_a_full_disk(store: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "paretofuse", "info", str(store)],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("paretofuse: error: stdout: ")
    assert done.stderr.count("\n") == 1


def test_a_trained_store_is_replaced_only_by_force(
    capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path
) -> None:
    command = stack_arguments(models, tmp_path / "s")
    assert call(capsys, *command)[0] == 0
    engine = paretofuse.load(tmp_path / "s")
    engine.training = {"method": "epo", "steps": 7, "data": {"cola": "train", "sst2": "train"}}
    engine.save(tmp_path / "s")
    code, out, err = call(capsys, *command)
    assert (code, out) == (1, "")
    assert "trained store (method epo, steps 7)" in err
    assert "--force" in err
    code, out, _ = call(capsys, "info", tmp_path / "s")
    assert code == 0
    assert "method epo, steps 7" in out
    assert json.loads(call(capsys, "info", tmp_path / "s", "--json")[1])["training"] == engine.training
    assert call(capsys, *command, "--force")[0] == 0
    info = json.loads(call(capsys, "info", tmp_path / "s", "--json")[1])
    assert (info["trained"], info["training"]) == (False, None)
