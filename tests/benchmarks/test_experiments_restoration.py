from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import paretofuse as pf

pytest.importorskip("PIL", reason="pictures are Pillow's")
pytest.importorskip("matplotlib", reason="the slider is drawn by it")
pytest.importorskip("peft", reason="TIES and DARE are PEFT's")

from benchmarks.data_sets import ncnn
from benchmarks.experiments import restoration, slider
from benchmarks.experiments.contenders import contenders
from benchmarks.experiments.experiment import Context, Meter, Models
from benchmarks.models.cugan import CONTEXT, UpCunet, load_ncnn
from tests.benchmarks.ncnn_files import write_ncnn


def test_a_tiny_experiment_runs_from_the_published_models_to_a_front(tmp_path: Path) -> None:
    experiment = restoration.load(True)
    models = Models(experiment, 0, tmp_path)
    listed = {contender.name: contender for contender in contenders(experiment)}
    assert not any("PWEMoE" in name for name in listed)
    assert not listed["rewarded soups"].every_seed
    assert listed["ours, 2 steps"].every_seed
    context = Context(experiment, models, 0, Meter())
    soups = listed["rewarded soups"].run(context).front
    corners = soups.values[soups.preferences.max(axis=1) == 1]
    order = soups.preferences[soups.preferences.max(axis=1) == 1].argmax(axis=1)
    experts = [context.measured(models.expert(experiment.names[i])) for i in order]
    np.testing.assert_allclose(corners, experts, atol=1e-3)
    assert len({tuple(values) for values in experts}) == 3
    ours = listed["ours, 2 steps"].run(context).front
    assert ours.values.shape == (7, 3)
    assert np.isfinite(ours.values).all()
    dense = listed["dense scalarization"].run(context)
    assert "costs are of 1" in dense.note


def test_the_slider_is_drawn(tmp_path: Path) -> None:
    from PIL import Image

    experts = {name: UpCunet(8) for name in restoration.EXPERTS}
    picture = np.random.default_rng().integers(0, 256, (88, 88, 3), np.uint8)
    slider.draw(pf.stack(UpCunet(8), experts), picture, tmp_path / "slider.png")
    with Image.open(tmp_path / "slider.png") as drawn:
        assert drawn.width > 1000
        assert len(set(drawn.convert("L").tobytes())) > 50


def test_crops_line_up_and_psnr_is_its_definition() -> None:
    random = np.random.default_rng()
    # A ramp: half its size is the ramp itself at the middle between two pixels.
    ramp = np.arange(160, dtype=np.uint8)[:, None, None].repeat(160, 1).repeat(3, 2)
    small, large = restoration.pair(ramp, "clean")
    assert small.shape == (1, 3, 80, 80)
    assert large.shape == (1, 3, 160 - 4 * CONTEXT, 160 - 4 * CONTEXT)
    inside = small[:, :, CONTEXT:-CONTEXT, CONTEXT:-CONTEXT]
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 2), inside, atol=1 / 255 + 1e-6, rtol=0)
    one, other = random.random((2, 3, 8, 8)), random.random((2, 3, 8, 8))
    found = restoration.psnr(torch.from_numpy(one), torch.from_numpy(other))
    truth = [10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(found.numpy(), truth, rtol=1e-12)
    torch.manual_seed(3)
    noise = (restoration.degraded(np.full((400, 400, 3), 128, np.uint8), "noisy").astype(float) - 128).std()
    assert abs(noise - restoration.NOISE) < 1
    picture = random.integers(0, 256, (64, 64, 3), np.uint8)
    assert (restoration.degraded(picture, "jpeg") != restoration.degraded(picture, "clean")).any()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_a_model_comes_back_from_ncnns_files(half: bool, tmp_path: Path) -> None:
    model, read = UpCunet(16), UpCunet(16)
    if half:
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float()
    write_ncnn(model, tmp_path, half)
    for parameter in read.parameters():
        nn.init.constant_(parameter, float("nan"))
    load_ncnn(read, tmp_path / "m.param", tmp_path / "m.bin")
    image = torch.rand(1, 3, 2 * CONTEXT + 6, 2 * CONTEXT + 10)
    out = read(image)
    assert out.shape == (1, 3, 12, 20)
    torch.testing.assert_close(out, model(image), rtol=0, atol=0)
    with pytest.raises(ncnn.NcnnError, match="has a kernel of shape"):
        load_ncnn(UpCunet(8), tmp_path / "m.param", tmp_path / "m.bin")


def test_files_that_are_not_ncnns_are_refused(tmp_path: Path) -> None:
    write_ncnn(UpCunet(8), tmp_path, half=True)
    graph, content = tmp_path / "m.param", tmp_path / "m.bin"
    text, data = graph.read_text(), content.read_bytes()
    for wrong, message in (
        (("7767518" + text[7:], data), "magic number"),
        ((text.replace("5=1", "5=0", 1), data), "with a bias"),
        ((text.replace("0=4", "0=x", 1), data), "cannot read the layer"),
        ((text, data[:-4]), "ends at"),
        ((text, data + b"\0\0\0\0"), "expected"),
        ((text, b"\x01" + data[1:]), "tag"),
        ((text, data[:4] + b"\xff\xff" + data[6:]), "not finite"),
    ):
        graph.write_text(wrong[0])
        content.write_bytes(wrong[1])
        with pytest.raises(ncnn.NcnnError, match=message):
            ncnn.read(graph, content)
