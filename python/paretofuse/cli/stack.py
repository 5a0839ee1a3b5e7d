"""`paretofuse stack`: checkpoints become a store."""

from __future__ import annotations

import argparse
import time

from paretofuse.cli.info import describe
from paretofuse.cli.options import Named, add_force, add_output, add_threads
from paretofuse.cli.running import Result, bar, use_threads
from paretofuse.engine.routing.families import FAMILIES

SUMMARY = "stack a base model and its experts into a store"
EXAMPLE = "paretofuse stack gpt2 --expert cola=gpt2-cola --expert sst2=gpt2-sst2 -o gpt2.store"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    parser.add_argument("base", metavar="BASE", help="model directory or .safetensors file")
    parser.add_argument(
        "--expert", action=Named, type=_named_path, required=True, metavar="NAME=PATH",
        help="a fine-tuned model, or its LoRA directory; once for each",
    )  # fmt: skip
    parser.add_argument(
        "--objective", action=Named, type=_named_list, metavar="NAME=EXPERT,...",
        help="the experts of an objective; once for each. Experts of none belong to none (default: an objective for "
        "each expert, of its name)",
    )  # fmt: skip
    add_output(parser, "STORE", "directory to write")
    parser.add_argument(
        "--route", choices=("mlp", "module", "tensor"), default="module",
        help="which tensors share a router (default: module)",
    )  # fmt: skip
    parser.add_argument(
        "--init", choices=("identity", "sqrt", "constant"), default="identity",
        help="routing weights before any learning: r, sqrt(r), or the static weight (default: identity)",
    )  # fmt: skip
    parser.add_argument(
        "--static-weight", type=float, default=0.3, metavar="WEIGHT",
        help="weight of every expert in tensors without a router (default: 0.3)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        type=_dtype,
        metavar="DTYPE",
        help="dtype of the merged model: float32, bfloat16 or float16 (default: that of the base)",
    )
    parser.add_argument(
        "--delta-dtype", type=_dtype, metavar="DTYPE",
        help="dtype of the stored differences alone (default: that of the merged model)",
    )  # fmt: skip
    parser.add_argument(
        "--planes", default="auto", metavar="FORMAT",
        help="how the differences are held: dense, fp32, bf16, fp16, int8, int4, lowrank:RANK, lowrank:ENERGY%%, or "
        "auto, which keeps LoRA experts as factors and takes int8 where the merged model is as exact (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--family", choices=FAMILIES,
        help="rows: a trained coefficient for each row of routed tensors besides one for each group; rows+columns: for "
        "each column of routed matrices too (default: scalar, until fit trains rows)",
    )  # fmt: skip
    parser.add_argument(
        "--head", action="append", default=[], metavar="PATTERN",
        help="tensors that each objective keeps for itself, such as 'classifier.*'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--transform", metavar="METHOD:NAME=VALUE,...",
        help="thin out what each expert adds by a merge method first, such as ties:density=0.2",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="TOKENIZER",
        help="of models with different vocabularies: base, union (every token that any has), or a directory; "
        "embeddings are matched token by token",
    )  # fmt: skip
    parser.add_argument(
        "--allow-misfit",
        action="store_true",
        help="stack experts whose configuration makes another model of the same tensors, and say so in a note",
    )
    add_force(parser)
    add_threads(parser)


def run(options: argparse.Namespace) -> Result:
    """Stack, and describe what was written."""
    from paretofuse.api import stack_to_store

    use_threads(options)
    started = time.perf_counter()
    with bar(options, "stack", "param", None) as update:
        notes = stack_to_store(
            options.base,
            dict(options.expert),
            options.output,
            route=options.route,
            init=options.init,
            static_weight=options.static_weight,
            dtype=options.dtype,
            delta_dtype=options.delta_dtype,
            objectives=dict(options.objective) if options.objective else None,
            planes=options.planes,
            family=options.family,
            heads=options.head,
            force=options.force,
            allow_misfit=options.allow_misfit,
            transform=options.transform,
            tokenizer=options.tokenizer,
            progress=update,
        )
    seconds = time.perf_counter() - started
    text, document = describe(options.output)
    lines = [*(f"note: {note}" for note in notes), text, f"stacked in {seconds:.1f} s"]
    return "\n".join(lines), {**document, "notes": list(notes), "seconds": seconds}, 0


def _dtype(text: str) -> str:
    """A dtype by any of its usual names, as `pf.stack` takes it."""
    from paretofuse.engine.dtypes import merged_dtype_name

    try:
        merged_dtype_name(text, "dtype")
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid choice {text!r}, expected float32, bfloat16 or float16"
        ) from None
    return text


def _named_path(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=PATH such as cola=models/gpt2-cola")
    return name, path


def _named_list(text: str) -> tuple[str, list[str]]:
    name, _, experts = text.partition("=")
    if not name or not all(experts.split(",")):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=EXPERT,... such as news=news_a,news_b")
    return name, experts.split(",")
