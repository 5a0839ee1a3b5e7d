"""Real-CUGAN's five published strengths of denoising: pictures of half the size, clean, noisy and JPEG-compressed.

Nothing is trained here but routers: the base is the published model without denoising, the experts are the others.
Those models were trained for pleasing pictures, not for PSNR, the metric here, on drawings more than on photographs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.data_sets import photos
from benchmarks.data_sets.photos import Picture
from benchmarks.experiments.contenders import OURS_FIT, OURS_STACK
from benchmarks.experiments.experiment import Context, Experiment, Outcome, fine_tune, trainable
from benchmarks.models import cugan
from benchmarks.models.cugan import CONTEXT, UpCunet

EXPERTS = {"clean": "conservative", "noisy": "denoise3x", "jpeg": "denoise2x"}
"""Of each objective the strength that scores highest on the training pictures among those not taken yet."""
LEFT_OVER = ("denoise1x",)
"""Published strengths of no objective."""
CAREFUL: Mapping[str, Any] = {"family": "scalar", "lr": 0.004, "corner_every": 2}
"""Of pf.fit, in place of what all experiments share: these models bear small and few steps alone, see
docs/restoration.md. It was chosen on coffee, china and two sheets of emoji, which nothing else here uses."""
NOISE = 30.0
"""Standard deviation of the noise, of 255."""
QUALITY = 20
"""Of JPEG, with halved colour resolution."""
TRAIN_PHOTOS = ("astronaut.png", "chelsea.png", "rocket.jpg", "flower.jpg")
TEST_PHOTOS = ("ihc.png", "retina.jpg")
TRAIN_DRAWINGS = ("🦊🏠🌻🚲", "🍎🐸🎈🚀", "🎸🐙🌵🍩", "🚂🐼🍉🎁")
TEST_DRAWINGS = ("🐰🍋🚕🎻", "🐢🍕🚁🌷")

Batch = tuple[Tensor, Tensor]
"""Small pictures with their context, float32 [B, 3, H + 36, W + 36], and the large ones, [B, 3, 2 H, 2 W]."""

SAME_FOR_EACH_SEED = (
    "base", "expert", "plain", "task", "TIES", "DARE", "rewarded", "dense", "MGDA", "NSGA",
)  # fmt: skip
"""How the names begin of contenders without routers, which no seed changes, and of rivals that are slow."""


@dataclass(frozen=True)
class Sizes:
    """Pixels of the small pictures without context, crops of a test picture, steps, and the model's channels."""

    train_side: int = 24
    test_side: int = 48
    crops: int = 2
    dense_steps: int = 75
    width: int = 64
    ours_steps: tuple[int, ...] = (75,)


QUICK = Sizes(4, 4, 2, 2, 8, (2,))


def degraded(large: Picture, objective: str) -> Picture:
    """Half the size by bicubic, then "noisy" or "jpeg"; noise is drawn by torch's random state."""
    image = Image.fromarray(large)
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    if objective == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
        image = Image.open(buffer)
    small = np.array(image)
    if objective == "noisy":
        noise = NOISE * torch.randn(small.shape).numpy()
        small = np.clip(np.rint(small + noise), 0, 255).astype(np.uint8)
    return small


def pair(large: Picture, objective: str) -> Batch:
    """A large picture that has the context too, 36 pixels on every side, as a batch of one."""
    small, whole = (
        torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        for picture in (degraded(large, objective), large)
    )
    edge = 2 * CONTEXT
    return small, whole[:, :, edge:-edge, edge:-edge]


def crop(picture: Picture, side: int, row: int, column: int) -> Picture:
    """A square whose small picture has `side` pixels beside its context."""
    length = 2 * (side + 2 * CONTEXT)
    return np.ascontiguousarray(picture[row : row + length, column : column + length])


class Crops:
    """Random crops of pictures, degraded anew each time, in an order that torch's random state decides."""

    def __init__(self, pictures: Sequence[Picture], objective: str, side: int) -> None:
        self._pictures, self._objective, self._side = pictures, objective, side

    def __iter__(self) -> Iterator[Batch]:
        length = 2 * (self._side + 2 * CONTEXT)
        for index in torch.randperm(len(self._pictures)).tolist():
            picture = self._pictures[index]
            row, column = (int(torch.randint(size - length + 1, ())) for size in picture.shape[:2])
            yield pair(crop(picture, self._side, row, column), self._objective)


def test_batches(pictures: Sequence[Picture], objective: str, sizes: Sizes) -> list[Batch]:
    """Fixed crops around each picture's middle, side by side, with fixed noise."""
    batches = []
    length, step = 2 * (sizes.test_side + 2 * CONTEXT), 2 * sizes.test_side
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for picture in pictures:
            height, width = picture.shape[:2]
            for number in range(sizes.crops):
                column = (width - length - (sizes.crops - 1) * step) // 2 + number * step
                large = crop(
                    picture, sizes.test_side, (height - length) // 2, max(0, min(column, width - length))
                )
                batches.append(pair(large, objective))
    return batches


def psnr(restored: Tensor, large: Tensor) -> Tensor:
    """10 log10(1 / mean squared error) of each picture [B], over all pixels and colours of values 0 to 1."""
    error = (restored - large).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


def loss(module: nn.Module, batch: Batch) -> Tensor:
    """The negative PSNR."""
    small, large = batch
    return -psnr(module(small), large).mean()


def scores(tests: dict[str, list[Batch]], module: nn.Module) -> dict[str, float]:
    """Mean PSNR of each objective, of pictures clipped to 0 to 1."""
    return {
        name: float(torch.cat([psnr(module(small).clamp(0, 1), large) for small, large in batches]).mean())
        for name, batches in tests.items()
    }


def learned_on_all(
    base: nn.Module, experts: Mapping[str, nn.Module], experiment: Experiment, seed: int
) -> pf.Engine:
    """Routers over all published strengths, those of no objective as further planes, learned with CAREFUL."""
    planes = {**experts, **{strength: cugan.published(strength) for strength in LEFT_OVER}}
    engine = pf.stack(base, planes, objectives={n: [n] for n in experiment.names}, **OURS_STACK)
    steps = experiment.ours_steps[0]
    pf.fit(
        engine,
        experiment.objectives,
        steps=steps,
        seed=seed,
        progress=False,
        sampler=OURS_FIT["sampler"],
        **CAREFUL,
    )
    return engine


def on_all(context: Context) -> Outcome:
    """Ours on all strengths."""
    base, experts, experiment = context.models.base(), context.models.experts(), context.experiment
    with context.meter:
        engine = learned_on_all(base, experts, experiment, context.seed)
    return Outcome(context.sweep(engine), "front", experiment.ours_steps[0], trainable(engine.routers))


def pictures(quick: bool) -> tuple[list[Picture], list[Picture]]:
    """To learn from, and to test on.

    Raises:
        DataError: a picture cannot be had.
    """
    if quick:
        chance = np.random.default_rng(0)
        made = [chance.integers(0, 256, (88, 88, 3), np.uint8) for _ in range(3)]
        return made[:2], made[2:]
    return (
        photos.photos(TRAIN_PHOTOS) + photos.drawings(TRAIN_DRAWINGS),
        photos.photos(TEST_PHOTOS) + photos.drawings(TEST_DRAWINGS),
    )


def load(quick: bool) -> Experiment:
    """The experiment; quick: noise for pictures and small models of random weights."""
    sizes = QUICK if quick else Sizes()
    train, test = pictures(quick)
    names = tuple(EXPERTS)
    tests = {name: test_batches(test, name, sizes) for name in names}
    objectives = tuple(pf.Objective(name, Crops(train, name, sizes.train_side), loss) for name in names)

    def published(strength: str) -> UpCunet:
        if not quick:
            return cugan.published(strength)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(list(cugan.STRENGTHS).index(strength))
            return UpCunet(sizes.width).eval()

    def train_base(seed: int) -> nn.Module:
        del seed  # it is what was published
        return published("none")

    def tune(model: nn.Module, preference: Sequence[float], seed: int) -> None:
        # An expert is what was published; whole models of other preferences, its rivals, are trained.
        if max(preference) == 1:
            strength = EXPERTS[names[list(preference).index(1)]]
            model.load_state_dict(published(strength).state_dict())
        else:
            fine_tune(model, objectives, preference, steps=sizes.dense_steps, lr=1e-4, seed=seed + 1)
        model.eval()

    centre = np.full((1, 3), 1 / 3)
    careful = f"ours, {sizes.ours_steps[0]} steps, all strengths, careful"
    return Experiment(
        name="restoration",
        title="Real-CUGAN, 1.28 million parameters: clean, noisy and JPEG-compressed pictures of half the size",
        objectives=objectives,
        evaluate=partial(scores, tests),
        metric="PSNR in dB",
        maximize=True,
        reference=(20.0,) * 3,
        make=partial(UpCunet, sizes.width),
        train_base=train_base,
        fine_tune=tune,
        identity=json.dumps([asdict(sizes), EXPERTS, NOISE, QUALITY, cugan.PACKAGE, quick]),
        preferences=np.concatenate([pf.simplex_grid(3, 3), centre]),
        scalarized=np.concatenate([np.eye(3), centre]),
        pwemoe_routes={},
        first_seed_only=SAME_FOR_EACH_SEED,
        ours_steps=sizes.ours_steps,
        family_steps=sizes.ours_steps,
        more={} if quick else {careful: on_all},
        notes=(
            "Nobody here trained these experts: they are Real-CUGAN's published strengths of denoising (bilibili, MIT; "
            f"PyPI {cugan.PACKAGE}, MIT), base: none; {', '.join(f'{k}: {v}' for k, v in EXPERTS.items())}. Their own "
            "aim was not PSNR. Seeds differ in the order of the crops that routers learn from; base and experts do "
            "not. Test pictures are others than those learned from. See [restoration](restoration.md).",
        ),
    )
