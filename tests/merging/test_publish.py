"""A merged model as a directory with its card, and what of it the Hub is sent: a stand-in for the Hub takes it down."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import paretofuse as pf
from paretofuse.cli import main
from tests.support.models import perturbed, tiny_gpt2


class Hub:
    """What `HfApi` is asked, in the place of it."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("login", {"token": token}))

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, *, folder_path: Path, **options: Any) -> SimpleNamespace:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload_folder", {"files": files, **options}))
        return SimpleNamespace(commit_url="https://hub/org/name/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    Hub.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub.calls


@pytest.fixture
def engine(tmp_path: Path) -> pf.Engine:
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\nthe base\n")
    return pf.stack(tmp_path / "base", {"news": perturbed(base, 1, 0.02), "poems": perturbed(base, 2, 0.02)})


def test_a_directory_as_the_engine_is_now(engine: pf.Engine, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def check(name: str) -> None:
        engine.save_pretrained(tmp_path / name, {"news": 0.7, "poems": 0.3})
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for tensor, values in engine.merge([0.7, 0.3]).state_dict().items():
            torch.testing.assert_close(found[tensor], values)

    check("never saved")
    engine.save(tmp_path / "store")
    check("saved")
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(0.05)
    check("trained since")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "news 0.7, poems 0.3" in card
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="other"):
        engine.save_pretrained(tmp_path / "other", [1.0, 0.0])
    assert (tmp_path / "other" / "mine.txt").read_text() == "keep"


def test_push_to_hub(engine: pf.Engine, hub: list[tuple[str, dict[str, Any]]]) -> None:
    url = engine.push_to_hub("org/name", {"news": 1.0}, private=True, revision="even", token="secret")
    assert url == "https://hub/org/name/commit/1"
    (_, login), (_, made), (_, branch), (last, sent) = hub
    assert login == {"token": "secret"}
    assert made == {"repo_id": "org/name", "private": True, "exist_ok": True}
    assert branch == {"repo_id": "org/name", "branch": "even", "exist_ok": True}
    assert (last, sent["repo_id"], sent["revision"]) == ("upload_folder", "org/name", "even")
    assert {"README.md", "config.json", "model.safetensors"} <= sent["files"].keys()
    with pytest.raises(ValueError, match="mail"):
        engine.push_to_hub("org/name", {"mail": 1.0})
    assert len(hub) == 4


def test_on_the_command_line(
    engine: pf.Engine,
    hub: list[tuple[str, dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine.save(tmp_path / "store")
    usual = ["merge", str(tmp_path / "store"), "--preference", "news=1"]
    out = str(tmp_path / "out")
    assert main([*usual, "-o", out, "--push-to-hub", "org/name"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/org/name/commit/1"
    assert [name for name, _ in hub] == ["login", "create_repo", "upload_folder"]
    for words in (["-o", f"{out}.safetensors", "--push-to-hub", "org/name"], ["-o", out, "--private"]):
        assert main([*usual, *words]) == 1
    assert len(hub) == 3
