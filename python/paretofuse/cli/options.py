"""The words of the command line: its commands, their options and help."""

from __future__ import annotations

import argparse
from typing import Any

import paretofuse

_DTYPES = ("float32", "bfloat16", "float16")


def _named_numbers(text: str) -> dict[str, float]:
    """NAME=NUMBER,NAME=NUMBER."""
    numbers: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        name = name.strip()
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise argparse.ArgumentTypeError(
                f"got {part!r}, expected NAME=NUMBER,NAME=NUMBER such as cola=0.7,sst2=0.3"
            )
        if name in numbers:
            raise argparse.ArgumentTypeError(f"got {name!r} twice, expected each name once")
        numbers[name] = number
    return numbers


def _named_path(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=PATH such as cola=models/gpt2-cola")
    return name, path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _axes(text: str) -> tuple[int, ...]:
    axes = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in axes):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected axes such as 0 or 0,1 (or '' for none)")
    return tuple(map(int, axes))


def _entry(text: str) -> str:
    module, _, name = text.partition(":")
    if not module or not name:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected MODULE:FUNCTION such as tasks.glue:accuracies"
        )
    return text


class _Experts(argparse.Action):
    """Collects --expert NAME=PATH, each name once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        experts = getattr(namespace, self.dest) or []
        if values[0] in dict(experts):
            parser.error(f"argument --expert: got {values[0]!r} twice, expected each name once")
        setattr(namespace, self.dest, [*experts, values])


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the parsed `command` names the command."""
    parser = argparse.ArgumentParser(
        prog="paretofuse",
        description="Turn any preference between fine-tuned experts into one dense model.",
        epilog="Each command has its own help: paretofuse merge --help",
    )
    parser.add_argument("--version", action="version", version=f"paretofuse {paretofuse.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    common.add_argument(
        "--quiet", action="store_true", help="no progress bar (there is none without a terminal)"
    )
    common.add_argument(
        "--traceback", action="store_true", help="on an error, show where in the program it was"
    )

    def command(name: str, text: str, example: str) -> Any:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )
        added.set_defaults(command=name)
        return added

    stack = command(
        "stack", "stack a base model and its experts into a store",
        "paretofuse stack gpt2 --expert cola=gpt2-cola --expert sst2=gpt2-sst2 -o gpt2.store",
    )  # fmt: skip
    stack.add_argument("base", metavar="BASE", help="model directory or .safetensors file")
    stack.add_argument(
        "--expert", action=_Experts, type=_named_path, required=True, metavar="NAME=PATH",
        help="a fine-tuned model of an objective, or its LoRA directory; once for each",
    )  # fmt: skip
    stack.add_argument("-o", "--output", required=True, metavar="STORE", help="directory to write")
    stack.add_argument(
        "--route", choices=("mlp", "module", "tensor"), default="module",
        help="which tensors share a router (default: module)",
    )  # fmt: skip
    stack.add_argument(
        "--init", choices=("identity", "sqrt", "constant"), default="identity",
        help="routing weights before any learning: r, sqrt(r), or the static weight (default: identity)",
    )  # fmt: skip
    stack.add_argument(
        "--static-weight", type=float, default=0.3, metavar="WEIGHT",
        help="weight of every expert in tensors without a router (default: 0.3)",
    )  # fmt: skip
    stack.add_argument(
        "--dtype", choices=_DTYPES, help="dtype of the merged model (default: that of the base)"
    )
    stack.add_argument(
        "--delta-dtype", choices=_DTYPES,
        help="dtype of the stored differences alone (default: that of the merged model)",
    )  # fmt: skip
    stack.add_argument(
        "--head", action="append", default=[], metavar="PATTERN",
        help="tensors that each objective keeps for itself, such as 'classifier.*'; may be repeated",
    )  # fmt: skip

    info = command("info", "say what a store holds", "paretofuse info gpt2.store --verify")
    info.add_argument("store", metavar="STORE")
    info.add_argument("--verify", action="store_true", help="read every file and compare its checksum")

    merge = command(
        "merge", "merge a store into a dense model for one preference",
        "paretofuse merge gpt2.store --preference cola=0.7,sst2=0.3 -o merged",
    )  # fmt: skip
    merge.add_argument("store", metavar="STORE")
    merge.add_argument(
        "--preference", type=_named_numbers, required=True, metavar="NAME=SHARE,...",
        help="the objectives' shares, which sum to 1; those of 0 may be left out",
    )  # fmt: skip
    merge.add_argument(
        "-o", "--output", required=True, metavar="OUT",
        help="model directory to write, or a name ending in .safetensors for the weights alone",
    )  # fmt: skip
    merge.add_argument("--head", metavar="NAME", help="use this objective's head")
    merge.add_argument(
        "--threads", type=_count, metavar="N", help="threads (default: all this process may use)"
    )
    merge.add_argument(
        "--isa", metavar="NAME", help="force an instruction set; `paretofuse doctor` lists them"
    )

    sweep = command(
        "sweep", "evaluate the merged models of evenly spaced preferences",
        "paretofuse sweep gpt2.store --evaluate tasks.glue:accuracies -o front.csv --plot front.png",
    )  # fmt: skip
    sweep.add_argument("store", metavar="STORE")
    sweep.add_argument(
        "--evaluate", type=_entry, required=True, metavar="MODULE:FUNCTION",
        help="called with the live module in eval mode; returns a dict of numbers by name",
    )  # fmt: skip
    sweep.add_argument(
        "--module", type=_entry, metavar="MODULE:FUNCTION",
        help="builds the model, where the store has no configuration that tells how",
    )  # fmt: skip
    sweep.add_argument("-o", "--output", required=True, metavar="CSV", help="table to write")
    sweep.add_argument(
        "--points", type=_count, default=11, help="points along an edge, ends included (default: 11)"
    )
    sweep.add_argument("--plot", metavar="PNG", help="picture to write")
    sweep.add_argument("--minimize", action="store_true", help="smaller numbers are better, as with losses")
    sweep.add_argument(
        "--reference", type=_named_numbers, metavar="NAME=VALUE,...",
        help="reference point of the hypervolume, which is then printed",
    )  # fmt: skip
    sweep.add_argument("--device", default="cpu", help="where to merge and evaluate (default: cpu)")

    export = command(
        "export", "compile the dense model for programs without Python (an AOTInductor package)",
        "paretofuse export vit.store --module models:make_vit --inputs models:example -o vit.pt2",
    )  # fmt: skip
    export.add_argument("store", metavar="STORE")
    export.add_argument("-o", "--output", required=True, metavar="PT2", help="package to write, *.pt2")
    export.add_argument(
        "--module", type=_entry, metavar="MODULE:FUNCTION",
        help="builds the model, where the store has no configuration that tells how",
    )  # fmt: skip
    export.add_argument(
        "--inputs", type=_entry, metavar="MODULE:FUNCTION",
        help="returns example inputs, a tuple or a dict by name (default: tokens, for Hugging Face models)",
    )  # fmt: skip
    export.add_argument(
        "--dynamic", type=_axes, metavar="AXIS,...",
        help="axes of every input that may vary (default: 0, or 0,1 without --inputs)",
    )  # fmt: skip
    export.add_argument(
        "--preference", type=_named_numbers, metavar="NAME=SHARE,...",
        help="weights that the package holds until others are put in (default: equal shares)",
    )  # fmt: skip
    export.add_argument("--head", metavar="NAME", help="use this objective's head")
    export.add_argument("--device", default="cpu", help="the kind of device to compile for (default: cpu)")

    doctor = command("doctor", "say what this installation can use", "paretofuse doctor --full")
    doctor.add_argument("--full", action="store_true", help="import torch too and ask it about GPUs")
    return parser
