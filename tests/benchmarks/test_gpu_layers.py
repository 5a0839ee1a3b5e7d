"""What `benchmarks.gpu.layers` predicts is counted by the launch rules, and its table is the committed one."""

from __future__ import annotations

import csv

from benchmarks.gpu import layers
from benchmarks.harness import record


def test_the_committed_table_is_what_is_counted() -> None:
    with (record.DATA / "gpu_layers.csv").open(newline="", encoding="utf-8") as file:
        committed = list(csv.DictReader(file))
    counted = [*layers.layers(), *layers.low_rank()]
    assert committed == [{name: str(value) for name, value in row.items()} for row in counted]


def test_the_way_that_is_taken_is_the_cheaper_one_by_bytes() -> None:
    """Beyond the rows where both cost about the same."""
    for outs, ins in layers.LAYERS:
        for rows, cheaper in ((1, True), (16, True), (512, False), (4096, False)):
            fused, merged = (layers.costs(outs, ins, rows, way) for way in (True, False))
            assert (fused["predicted_us"] < merged["predicted_us"]) is cheaper


def test_pytorch_takes_a_launch_for_every_step_of_every_plane() -> None:
    """Of each matrix: widen the base; for each plane widen B, scale it, widen A, multiply; round."""
    assert layers.by_pytorch().launches == len(layers.MATRICES) * (1 + 4 * layers.EXPERTS + 1)
