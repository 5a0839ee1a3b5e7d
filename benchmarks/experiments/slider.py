"""Draws docs/restoration.png: one picture restored along the front, a slider of denoising with continuous strength.

python -m benchmarks.experiments.slider             learns the routers as the experiment does, seed 0, then draws
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

import paretofuse as pf
from benchmarks.data_sets.photos import Picture
from benchmarks.experiments import restoration
from benchmarks.experiments.restoration import EXPERTS, pair, psnr
from benchmarks.harness.record import ROOT
from benchmarks.models import cugan
from benchmarks.models.cugan import CONTEXT

matplotlib.use("Agg")

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the noisy objective; the rest is the clean one's."""


def draw(engine: pf.Engine, picture: Picture, path: Path) -> None:
    """Two rows, the same picture clean and noisy; columns: what goes in, five merged models, the truth."""
    from matplotlib import pyplot

    figure, places = pyplot.subplots(2, len(SHARES) + 2, figsize=(14, 4.4), layout="constrained")
    names = list(EXPERTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batches = {objective: pair(picture, objective) for objective in ("clean", "noisy")}
    for row, (objective, (small, large)) in zip(places, batches.items(), strict=True):
        inside = small[0, :, CONTEXT:-CONTEXT, CONTEXT:-CONTEXT].permute(1, 2, 0)
        row[0].imshow(inside.numpy(), interpolation="nearest")
        row[0].set_title(f"{objective}, half the size")
        for axes, share in zip(row[1:-1], SHARES, strict=True):
            preference = {"clean": 1 - share, "noisy": share}
            engine.switch([preference.get(name, 0.0) for name in names])
            with torch.no_grad():
                restored = engine.module(small).clamp(0, 1)
            axes.imshow(restored[0].permute(1, 2, 0).numpy())
            axes.set_title(f"noisy {share:g}: {float(psnr(restored, large)):.1f} dB")
        row[-1].imshow(large[0].permute(1, 2, 0).numpy())
        row[-1].set_title("truth")
    for axes in places.flat:
        axes.set_axis_off()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Learn and draw."""
    experts = {name: cugan.published(strength) for name, strength in EXPERTS.items()}
    engine = restoration.learned_on_all(cugan.published("none"), experts, restoration.load(False), 0)
    draw(engine, restoration.pictures(False)[1][-1], ROOT / "docs" / "restoration.png")
    print("wrote docs/restoration.png")


if __name__ == "__main__":
    main()
