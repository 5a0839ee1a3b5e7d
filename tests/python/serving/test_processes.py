"""Processes share a store's pages, and a forked one serves by an engine and an app of its parent."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import paretofuse as pf
from tests.support.models import perturbed
from tests.support.process import ROOT, python
from tests.support.served import text_store

pytest.importorskip("fastapi", reason="the server comes with the extra `serve`")

OPENED = """
import os, sys
import torch
from torch import nn
import paretofuse as pf

torch.set_num_threads(1)
engine = pf.load(sys.argv[1], module=nn.Linear(512, 700))
engine.merge([0.4, 0.6])  # reads the base and both planes
if sys.argv[2:] and os.fork() == 0:
    engine.merge([0.4, 0.6])  # reads them by what the parent opened
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def memory(process: int, store: Path) -> tuple[int, int]:
    """KiB of a store's files that a process has in memory, and its own part of them, as Linux shares them out (PSS)."""
    sizes, own = {"Rss": 0, "Pss": 0}, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        word = line.split()[0]
        if not word.endswith(":"):  # the head of a mapping: addresses, rights, offset, device, inode, path
            own = str(store) in line
        elif own and word[:-1] in sizes:
            sizes[word[:-1]] += int(line.split()[1])
    return sizes["Rss"], sizes["Pss"]


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="Linux alone tells a process's part of shared pages"
)
def test_processes_share_the_pages_of_a_store(tmp_path: Path) -> None:
    base = nn.Linear(512, 700)
    store = tmp_path / "store"
    pf.stack(base, {"a": perturbed(base, 1), "b": perturbed(base, 2)}, planes="bf16").save(store)
    files = sum(file.stat().st_size for file in store.iterdir()) / 1024
    with contextlib.ExitStack() as stack:
        processes: list[int] = []
        for words in ([], ["fork"]):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-c", OPENED, store, *words],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                )
            )  # fmt: skip
            assert process.stdout is not None
            processes += [int(process.stdout.readline()) for _ in range(1 + len(words))]
            for number in processes:
                resident, part = memory(number, store)
                assert resident >= 0.9 * files
                assert part == pytest.approx(resident / len(processes), rel=0.05)


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_spawned_process_opens_the_store_itself(take: Callable[[object], object]) -> None:
    """What multiprocessing would send it is refused with words."""
    base = nn.Linear(4, 3)
    engine = pf.stack(base, {"a": perturbed(base, 1), "b": perturbed(base, 2)})
    with pytest.raises(TypeError, match=r"expected its store's path; pf\.load\(path\) in the other process"):
        take(engine)


FORKED = """
import os, signal, sys
import torch
from starlette.testclient import TestClient
import paretofuse as pf
from paretofuse.serving import create_app

torch.set_num_threads(1)
app = create_app(pf.load(sys.argv[1]))
body = {"prompt": "The sea", "max_tokens": 9, "temperature": 0, "preference": {"news": 0.6, "poems": 0.4}}

def ask():
    return TestClient(app).post("/v1/completions", json=body).json()["choices"][0]["text"]

truth = ask()  # starts the thread that computes, and holds a replica
child = os.fork()
if child == 0:
    signal.alarm(100)  # a child that hangs is killed
    os._exit(0 if ask() == truth else 3)
status = os.waitpid(child, 0)[1]
assert ask() == truth
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


def test_a_forked_process_serves_the_app_of_its_parent(tmp_path: Path) -> None:
    python(FORKED, text_store(tmp_path))
