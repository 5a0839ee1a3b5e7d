"""Live PEFT models as experts: the active adapters' factors, and whatever else differs from the base."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from paretofuse.adapters.peft.config import OUT_PROJ_ADDED, check_plain_sum
from paretofuse.adapters.peft.source import Adapter, Base, Whole, to_source
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.factors import Factors
from paretofuse.engine.stacking.sources import Source, TensorInfo


def is_live(module: nn.Module) -> bool:
    """Whether PEFT has taken hold of a module (get_peft_model, inject_adapter_in_model, add_adapter)."""
    if sys.modules.get("peft") is None:  # whoever has done so has imported it; importing it takes seconds
        return False
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(part, (PeftModel, PeftMixedModel, BaseTunerLayer)) for part in module.modules())


def from_model(model: Any, label: str, base: Source) -> Source:
    """A source of deltas over a live PEFT model: what merge_and_unload() would make of its active adapters.

    Its own base weights count: where they are not the base's (PiSSA and its kin change them), they are its delta too.

    Args:
        model: a PeftModel, or a module into which PEFT has put adapters.
        label: what to call it in messages.
        base: the model that will be stacked.

    Raises:
        CheckpointError: an adapter that is no plain sum, one that is merged already, or other tensors than the base's.
    """
    from peft import PeftModel

    parts = [part for part in model.modules() if isinstance(part, PeftModel)]
    configs = [part.peft_config[name] for part in parts for name in part.active_adapters]
    configs = configs or list(getattr(model, "peft_config", {}).values())
    for config in configs:
        check_plain_sum(config.to_dict(), label)
    known = Base(base)
    missing: list[str] = []
    for root in (model, *parts):  # the model itself, or what a wrapper of it holds
        walk = _Walk(label)
        plain = dict(walk.tensors(root, ""))
        lacking = [name for name in known.infos if name not in plain and name not in base.constants]
        missing = missing or lacking
        if not lacking:
            break
    else:
        raise CheckpointError(
            f"{label}: has no tensor {missing[0]!r}, which {base.label} has; pass the model that it was made of"
        )
    whole = {name: _whole(tensor, name in walk.saved) for name, tensor in plain.items()}
    for name in walk.factors:
        for update in walk.factors[name]:
            _check_fit(update, name, known, label)
    keeps_ties = any(getattr(config, "ensure_weight_tying", False) for config in configs)
    return to_source(Adapter(walk.factors, whole, keeps_ties), known, label)


class _Walk:
    """Collects a module's own tensors by the names that they had without PEFT, and the factors of its adapters."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.factors: dict[str, tuple[Factors, ...]] = {}
        self.saved: set[str] = set()
        self.added: dict[str, int] = {}  # layers whose update PEFT adds more than once

    def tensors(self, module: Any, name: str) -> Iterator[tuple[str, Tensor]]:
        """The module's stored tensors, as its active adapters leave them apart from their factors."""
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import MultiheadAttention
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        if isinstance(module, PeftModel):
            yield from self.tensors(module.base_model.model, name)
        elif isinstance(module, ModulesToSaveWrapper):
            active = [own for own in module.active_adapters if own in module.modules_to_save]
            inner = module.modules_to_save[active[0]] if active else module.original_module
            found = dict(self.tensors(inner, name))
            self.saved.update(found if active else ())
            yield from found.items()
        elif isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
            self._check_unmerged(layer, name)
            for own, tensor in self.tensors(layer.base_layer, name):
                yield (
                    own,
                    layer.get_merged_weights(layer.active_adapters) if own == f"{name}.weight" else tensor,
                )
        elif isinstance(module, LoraLayer):
            self._check_unmerged(module, name)
            if isinstance(module, MultiheadAttention):
                self.added[f"{name}.out_proj"] = OUT_PROJ_ADDED
            for adapter in module.active_adapters:
                if adapter in module.lora_A or adapter in module.lora_embedding_A:
                    self._add_factors(module, adapter, name)
            yield from self.tensors(module.base_layer, name)
        elif isinstance(module, BaseTunerLayer):
            raise CheckpointError(
                f"{self.label}: {name!r} carries an adapter of class {type(module).__name__}, which is not a plain "
                "LoRA; call merge_and_unload() and stack the merged model"
            )
        else:
            prefix = f"{name}." if name else ""
            for own, tensor in _direct(module).items():
                yield prefix + own, tensor
            for own, child in module.named_children():
                yield from self.tensors(child, prefix + own)

    def _check_unmerged(self, layer: Any, name: str) -> None:
        if layer.merged_adapters:
            raise CheckpointError(
                f"{self.label}: the adapters {layer.merged_adapters} are merged into {name!r}; call unmerge_adapter() "
                "first, or merge_and_unload() and stack the merged model"
            )

    def _add_factors(self, layer: Any, adapter: str, name: str) -> None:
        """The factors of one adapter of one layer."""
        from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

        scale, rank = float(layer.scaling[adapter]), int(layer.r[adapter])
        if isinstance(layer, ParamWrapper):
            self._add(f"{name}.{layer.parameter_name}", _stacked(layer, adapter, rank, scale))
            return
        if adapter in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            self._add(f"{name}.weight", _pair(a, b, rank, scale, True))
            return
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        weight = "in_proj_weight" if isinstance(layer, MultiheadAttention) else "weight"
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
        self._add(f"{name}.{weight}", _pair(a, b, rank, scale * self.added.get(name, 1), transposed))
        bias = layer.lora_B[adapter].bias
        if bias is not None:
            self._add(f"{name}.bias", _pair(bias.new_ones(1, 1), bias.unsqueeze(1), 1, scale, False))

    def _add(self, name: str, update: Factors) -> None:
        self.factors[name] = (*self.factors.get(name, ()), update)


def _direct(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and stored buffers, without those of its children."""
    buffers = {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {**dict(module.named_parameters(recurse=False, remove_duplicate=False)), **buffers}


def _whole(tensor: Tensor, breaks_tie: bool) -> Whole:
    flat = tensor.detach().reshape(-1)
    return Whole(
        TensorInfo(tuple(tensor.shape), tensor.dtype), lambda start, stop: flat[start:stop], breaks_tie
    )


def _pair(a: Tensor, b: Tensor, rank: int, scale: float, transposed: bool) -> Factors:
    return Factors(
        rank, scale, transposed, lambda: (a.detach().float().flatten(1), b.detach().float().flatten(1))
    )


def _stacked(layer: Any, adapter: str, rank: int, scale: float) -> Factors:
    """The factors of a targeted parameter: one pair for each weight of its stack, if it is one."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if layer.get_param().dim() == 2:
        return _pair(a, b, rank, scale, False)
    count = int(layer.num_experts)

    def read() -> tuple[Tensor, Tensor]:
        return (
            a.detach().float().view(count, rank, -1),
            b.detach().float().view(-1, rank, count).permute(2, 0, 1),
        )

    return Factors(rank, scale, not layer._did_swap_in_out_features, read)


def _check_fit(update: Factors, name: str, base: Base, label: str) -> None:
    """The update must have the shape of the base's tensor.

    Raises:
        CheckpointError: it does not, or the base has no such tensor.
    """
    a, b = update.read()
    numel = b.shape[-2] * a.shape[-1] * (a.shape[0] if a.dim() == 3 else 1)
    if name not in base.infos or base.infos[name].numel != numel:
        raise CheckpointError(
            f"{label}: an adapter changes {name!r} by {numel} elements, and {base.source.label} has "
            f"{base.infos[name].numel if name in base.infos else 'no such tensor'}; pass the model that it was made of"
        )
