"""What a recipe says: mergekit's keys, read and checked. Whatever is not supported is refused by its key and line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paretofuse.engine.methods.method import Method
from paretofuse.engine.methods.registry import by_name
from paretofuse.recipes.reading import Node, read_yaml
from paretofuse.recipes.settings import Settings, check_setting

KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""What recipes call dtypes."""


@dataclass(frozen=True)
class Input:
    """A model that goes into a slice: its name in the recipe, its layers (None for all), and its own parameters."""

    model: str
    layers: tuple[int, int] | None
    parameters: Settings
    line: int


@dataclass(frozen=True)
class Slice:
    """Layers of the merged model, one after the other, and what goes into each."""

    inputs: tuple[Input, ...]
    base: str | None
    parameters: Settings
    line: int


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes:
        file: what to call it in messages.
        text: the YAML, as it was given.
        method: the merge method.
        base: the base model's name.
        slices: the merged model's layers; one slice of all layers where the recipe lists models.
        parameters: those of the whole merge.
        dtype: the safetensors dtype that inputs are rounded to first; None for their own.
        out_dtype: that of the merged model; None for `dtype`, or that of the inputs.
        tokenizer: "base", "union" or a model's name; None to copy the base's files.
        pad_vocabulary_to: rows of embeddings are a multiple of it.
        chat_template: "auto", a known template's name, a template, or None.
        notes: what a user should know, a sentence each.
    """

    file: str
    text: str
    method: Method
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Settings
    dtype: str | None
    out_dtype: str | None
    tokenizer: str | None
    pad_vocabulary_to: int | None
    chat_template: str | None
    notes: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model once, the base first."""
        named = [source.model for piece in self.slices for source in piece.inputs]
        bases = [self.base, *(piece.base for piece in self.slices)]
        return tuple(dict.fromkeys(name for name in (*bases, *named) if name is not None))

    def where(self, line: int) -> str:
        """A place in the recipe for a message."""
        return f"{self.file}, line {line}"


def read_recipe(path: str | Path, methods: Sequence[Method] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        methods: a user's own, beside those that there are.

    Raises:
        ValueError: no recipe, a key or method that is not supported, a value out of range; names the line.
        OSError: the file cannot be read.
        ImportError: PyYAML is missing.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: this is no text in UTF-8: {error.reason}") from error
    return parse(text, path.name, methods)


def parse(text: str, file: str = "recipe", methods: Sequence[Method] = ()) -> Recipe:
    """A recipe from its YAML text; raises as `read_recipe`."""
    return _Parser(by_name(methods)).recipe(read_yaml(text, file), text)


class _Parser:
    """Reads the parts of one recipe; collects the notes on the way."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self.methods = methods
        self.known = {p.name for method in methods.values() for p in method.parameters}
        self.notes: list[str] = []

    def recipe(self, root: Node, text: str) -> Recipe:
        found = root.mapping("a recipe", KEYS)
        self.method = self._method(root, found)
        given = [key for key in ("models", "slices") if key in found]
        if len(given) != 1:
            raise root.error(f"got {' and '.join(given) or 'neither'}, expected either models: or slices:")
        base = self._model(found["base_model"]) if "base_model" in found else None
        slices = (
            [self._models(found["models"], base)]
            if "models" in found
            else [self._slice(node) for node in found["slices"].items("slices")]
        )
        for piece in slices:
            self._check_inputs(root, piece, piece.base or base)
        tokenizer, pad = self._tokenizer(root, found)
        return Recipe(
            file=root.file,
            text=text,
            method=self.method,
            base=base,
            slices=tuple(slices),
            parameters=self._parameters(found),
            dtype=self._dtype(found, "dtype"),
            out_dtype=self._dtype(found, "out_dtype"),
            tokenizer=tokenizer,
            pad_vocabulary_to=pad,
            chat_template=found["chat_template"].text("chat_template") if "chat_template" in found else None,
            notes=tuple(self.notes),
        )

    def _method(self, root: Node, found: Mapping[str, Node]) -> Method:
        if "merge_method" not in found:
            raise root.error("got no merge_method, expected one such as merge_method: ties")
        node = found["merge_method"]
        name = node.text("merge_method")
        if name not in self.methods:
            raise node.error(
                f"got merge_method: {name}, which is not supported; expected one of {', '.join(self.methods)}"
            )
        return self.methods[name]

    def _models(self, node: Node, base: str | None) -> Slice:
        inputs = []
        for item in node.items("models"):
            own = item.mapping("a model", ("model", "parameters"))
            inputs.append(Input(self._named(item, own), None, self._parameters(own), item.line))
        if base is not None and base not in [source.model for source in inputs]:
            inputs.append(Input(base, None, {}, node.line))
        return Slice(tuple(inputs), None, {}, node.line)

    def _slice(self, node: Node) -> Slice:
        found = node.mapping("a slice", ("sources", "base_model", "parameters"))
        if "sources" not in found:
            raise node.error("got a slice without sources, expected a list of models and layer ranges")
        inputs = []
        for item in found["sources"].items("sources"):
            own = item.mapping("a source", ("model", "layer_range", "parameters"))
            model = self._named(item, own)
            if "layer_range" not in own:
                raise item.error(f"got no layer_range for {model}, expected one such as [0, 16]")
            ends = own["layer_range"].items("layer_range")
            if len(ends) != 2:
                raise own["layer_range"].error(
                    f"got {len(ends)} numbers for layer_range, expected [first, end]"
                )
            first, end = (part.number("layer_range") for part in ends)
            if not 0 <= first < end:
                raise own["layer_range"].error(
                    f"got layer_range: [{first}, {end}], expected [first, end] with 0 <= first < end"
                )
            inputs.append(Input(model, (first, end), self._parameters(own), item.line))
        sizes = {source.layers[1] - source.layers[0] for source in inputs if source.layers is not None}
        if len(sizes) > 1:
            raise node.error(
                f"got sources of {', '.join(map(str, sorted(sizes)))} layers in one slice, expected equally many"
            )
        base = self._model(found["base_model"]) if "base_model" in found else None
        return Slice(tuple(inputs), base, self._parameters(found), node.line)

    def _check_inputs(self, root: Node, piece: Slice, base: str | None) -> None:
        """Check that a slice has the models that the method takes."""
        names = [source.model for source in piece.inputs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise root.error(f"got the model {twice} twice in one slice, expected it once", piece.line)
        apart = self.method.base != "none"
        if apart and base is not None and base not in names:
            raise root.error(
                f"got a slice without the base model {base}, expected it among the sources", piece.line
            )
        if self.method.base == "required" and base is None:
            raise root.error(f"got no base_model, which {self.method.name} requires", piece.line)
        count = len(names) - (1 if apart and base is not None else 0)
        low, high = self.method.models
        if count < low or (high is not None and count > high):
            wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            beside = " beside the base model" if apart else ""
            raise root.error(
                f"got {count} models{beside} for {self.method.name}, expected {wanted}", piece.line
            )

    def _named(self, node: Node, own: Mapping[str, Node]) -> str:
        if "model" not in own:
            raise node.error("got no model, expected its directory or Hub id: model: org/name")
        return self._model(own["model"])

    def _model(self, node: Node) -> str:
        name = node.text("a model")
        if "+" in name and not Path(name).exists():
            raise node.error(
                f"got {name}, a model with a LoRA, which recipes do not take; merge it first with PEFT's "
                "merge_and_unload and save_pretrained, or stack it: paretofuse stack --expert NAME=LORA"
            )
        return name

    def _parameters(self, found: Mapping[str, Node]) -> Settings:
        """A block of parameters, its values checked; those that only other methods have are left out with a note."""
        if "parameters" not in found or found["parameters"].value is None:
            return {}
        node = found["parameters"]
        own = {parameter.name: parameter for parameter in self.method.parameters}
        kept = {}
        for name, setting in node.mapping("parameters").items():
            if name in own:
                check_setting(setting, own[name])
                kept[name] = setting
            elif name in self.known:
                self.notes.append(
                    f"{node.file}, line {node.keys[name]}: {self.method.name} has no {name}; not used"
                )
            else:
                raise node.error(
                    f"got the parameter {name!r}, which no method has; {self.method.name} has "
                    f"{', '.join(own) or 'none'}",
                    node.keys[name],
                )
        return kept

    @staticmethod
    def _dtype(found: Mapping[str, Node], key: str) -> str | None:
        if key not in found or found[key].value is None:
            return None
        name = found[key].text(key).removeprefix("torch.")
        if name not in DTYPES:
            raise found[key].error(f"got {key}: {name}, expected one of {', '.join(DTYPES)}")
        return DTYPES[name]

    def _tokenizer(self, root: Node, found: Mapping[str, Node]) -> tuple[str | None, int | None]:
        if "tokenizer" not in found:
            source = found.get("tokenizer_source")
            return (None if source is None else source.text("tokenizer_source")), None
        if "tokenizer_source" in found:
            raise root.error("got tokenizer and tokenizer_source, expected one of them")
        own = found["tokenizer"].mapping("tokenizer", ("source", "pad_to_multiple_of"))
        pad = own["pad_to_multiple_of"].number("pad_to_multiple_of") if "pad_to_multiple_of" in own else None
        if pad is not None and pad < 1:
            raise own["pad_to_multiple_of"].error(
                f"got pad_to_multiple_of: {pad}, expected a number of at least 1"
            )
        return own["source"].text("source") if "source" in own else "union", pad
