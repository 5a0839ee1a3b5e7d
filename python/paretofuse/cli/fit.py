"""`paretofuse fit`: train the routers of a store."""

from __future__ import annotations

import argparse
import time

import paretofuse
from paretofuse.cli.info import describe
from paretofuse.cli.options import add_engine, add_entry, add_force, add_output, count
from paretofuse.cli.running import Result, entry_point, load_engine, shows_progress
from paretofuse.engine.routing.families import FAMILIES

SUMMARY = "train the routers of a store, and nothing else in it"
EXAMPLE = "paretofuse fit gpt2.store --objectives tasks:objectives --steps 100 -o trained.store"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_engine(parser, "where to train")
    add_entry(
        parser,
        "--objectives",
        "called without arguments; returns for each objective its batches and its loss, {name: (batches, loss)}, "
        "loss(module, batch) being a scalar",
        required=True,
    )
    add_output(
        parser,
        "STORE",
        "store to write (default: the trained one takes the place of the given one)",
        required=False,
    )
    parser.add_argument(
        "--steps", type=count, default=400, metavar="N", help="optimizer steps (default: 400)"
    )
    parser.add_argument(
        "--method", default="ls", metavar="NAME",
        help="the solver, such as ls, epo or stch; docs/solvers.md has all (default: ls, linear scalarization)",
    )  # fmt: skip
    parser.add_argument(
        "--lr", type=float, default=6e-2, metavar="RATE", help="learning rate at the start (default: 0.06)"
    )
    parser.add_argument(
        "--preferences-per-step", type=count, default=1, metavar="N",
        help="preferences that share a step; each costs as much as a step with one (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--family", choices=FAMILIES,
        help="rows: train a coefficient for each row of routed tensors as well, thousands of numbers; rows+columns: "
        "for each column of routed matrices too; scalar: one for each group alone, hundreds (default: rows)",
    )  # fmt: skip
    parser.add_argument(
        "--row-lr",
        type=float,
        metavar="RATE",
        help="learning rate of row coefficients (default: half of --lr)",
    )
    parser.add_argument(
        "--row-shrinkage", type=float, metavar="SHARE",
        help="share of the row coefficients, times their rate, that each step takes away (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--add-consensus", metavar="METHOD:NAME=VALUE,...",
        help="a merge of all experts as one more plane, by a merge method such as iso_c or ties:density=0.2, or "
        "regmean, which looks at 8 batches of each objective (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--add-planes", type=count, metavar="RANK",
        help="train a plane of this rank for each objective besides, over every routed matrix (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--plane-lr", type=float, metavar="RATE", help="learning rate of trained planes (default: 0.003)"
    )
    parser.add_argument(
        "--plane-shrinkage", type=float, metavar="SHARE",
        help="share of the trained planes, times their rate, that each step takes away (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--plane-orthogonality", type=float, metavar="SHARE",
        help="how far each step turns different objectives' trained planes apart, times their rate (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--sketch", type=count, metavar="RANK",
        help="learn linear layers from the rank-RANK parts of what experts add, such as 16: less time and memory "
        "(default: from all of it)",
    )  # fmt: skip
    parser.add_argument(
        "--capture", action="store_true",
        help="replay steps as a CUDA graph, on one GPU; all batches of an objective must be of the same shapes",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    add_entry(
        parser, "--validation", "called without arguments; returns a paretofuse.Validation, which stops early"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="kept while training; the same command goes on from it"
    )
    parser.add_argument(
        "--log",
        metavar="LOG",
        help="losses of each step: a .csv file, a TensorBoard directory, or wandb, mlflow, aim or trackio",
    )
    add_force(parser)


def run(options: argparse.Namespace) -> Result:
    """Train, and write the store whole."""
    from paretofuse.outputs import prepare_store

    objectives = entry_point("--objectives", options.objectives)()
    validation = entry_point("--validation", options.validation)() if options.validation else None
    engine = load_engine(options)
    output = options.output or options.store
    prepare_store(output, engine, force=options.force)
    if options.add_consensus is not None:
        from paretofuse.engine.training.consensus import reads_data

        read = objectives if reads_data(options.add_consensus) else None
        paretofuse.add_consensus(engine, options.add_consensus, objectives=read, planes="auto")
    if options.add_planes is not None:
        paretofuse.add_planes(engine, options.add_planes, seed=options.seed)
    started = time.perf_counter()
    records = paretofuse.fit(
        engine,
        objectives,
        options.method,
        steps=options.steps,
        lr=options.lr,
        preferences_per_step=options.preferences_per_step,
        family=options.family,
        row_lr=options.row_lr,
        row_shrinkage=options.row_shrinkage,
        plane_lr=options.plane_lr,
        plane_shrinkage=options.plane_shrinkage,
        plane_orthogonality=options.plane_orthogonality,
        sketch=options.sketch,
        capture=options.capture,
        seed=options.seed,
        validation=validation,
        checkpoint=options.checkpoint,
        log=options.log,
        progress=shows_progress(options),
    )
    seconds = time.perf_counter() - started
    engine.save(output, force=options.force)
    text, document = describe(output)
    lines = [text, f"{len(records)} steps of {options.method} in {seconds:.1f} s"]
    if records:
        last = {name: records[-1][f"loss/{name}"] for name in engine.objectives}
        lines.append(
            "loss at the last step: " + ", ".join(f"{name} {loss:.4g}" for name, loss in last.items())
        )
        document["loss"] = last
    return (
        "\n".join(lines),
        {**document, "steps": len(records), "method": options.method, "seconds": seconds},
        0,
    )
