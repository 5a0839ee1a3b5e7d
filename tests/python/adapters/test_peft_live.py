"""Live PEFT models as experts: what merge_and_unload() makes of their active adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from tests.support.adapters import CASES, Q, check, fill, llama, merged_by_us, peft, roberta, wrapped
from tests.support.models import tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore")


def merged(model: Any) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in copy.deepcopy(model).merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_the_merge_is_pefts_own(case: str) -> None:
    make, settings = CASES[case]
    base = make()
    model = wrapped(base, **settings)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    check(merged_by_us(base, model), merged(model), base)
    after = model.state_dict()  # stacking leaves its inputs as they were
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_2"])
def test_a_start_that_changed_the_base_counts(start: str) -> None:
    """The live model has the changed base weights, which a saved adapter lacks."""
    base = llama()
    model = wrapped(base, init_lora_weights=start, **Q)
    check(merged_by_us(base, model), merged(model), base)


def two_adapters(base: nn.Module) -> Any:
    model = wrapped(base, 1, name="news", **Q)
    model.add_adapter(
        "poems", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.set_adapter("poems")
    fill(model, 2)
    return model


@pytest.mark.parametrize("active", ["news", "poems", ["news", "poems"]])
def test_the_active_adapters_count(active: str | list[str]) -> None:
    base = llama()
    model = two_adapters(base)
    model.base_model.set_adapter(active)
    check(merged_by_us(base, model), merged(model), base)


def test_combined_and_rescaled_adapters() -> None:
    base = llama()
    model = two_adapters(base)
    model.add_weighted_adapter(["news", "poems"], [0.3, 0.9], "both", combination_type="cat")
    model.set_adapter("both")
    check(merged_by_us(base, model), merged(model), base)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scale_layer(0.5)
    check(merged_by_us(base, model), merged(model), base)


def test_adapters_put_into_a_module() -> None:
    base = llama()
    config = peft.LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, copy.deepcopy(base))
    fill(model, 3)
    theirs = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            theirs[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    assert len(theirs) == 2
    ours = merged_by_us(base, model)
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(ours[name], theirs.get(name, tensor).detach(), rtol=1e-5, atol=1e-6)


def test_a_peft_model_inside_a_wrapper() -> None:
    base = llama()
    model = wrapped(base, **Q)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    check(merged_by_us(base, Wrapper()), merged(model), base)


def test_a_peft_model_within_a_larger_model() -> None:
    class Larger(nn.Module):
        def __init__(self, text: nn.Module) -> None:
            super().__init__()
            self.text = text
            self.head = nn.Linear(3, 3)

    base = Larger(llama())
    expert = Larger(wrapped(base.text, **Q))
    theirs = {f"text.{name}": t for name, t in merged(expert.text).items()}
    theirs |= {f"head.{name}": t for name, t in expert.head.state_dict().items()}
    check(merged_by_us(base, expert), theirs, base)


def test_what_is_refused() -> None:
    base = llama()
    model = wrapped(base, **Q)
    with pytest.raises(pf.CheckpointError, match=r"can be an expert only.*model\.unload\(\)"):
        pf.stack(model, {"x": base})
    pf.stack(copy.deepcopy(model).unload(), {"x": model})  # the remedy
    model.merge_adapter()
    with pytest.raises(pf.CheckpointError, match=r"merged into 'model.*unmerge_adapter\(\)"):
        pf.stack(base, {"x": model})
    model.unmerge_adapter()
    pf.stack(base, {"x": model})
    with pytest.raises(pf.CheckpointError, match=r"DoRA.*merge_and_unload"):
        pf.stack(base, {"x": wrapped(base, use_dora=True, **Q)})
    for config, message in (
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), r"IA3.*merge_and_unload"),
        (peft.LoHaConfig(target_modules=["q_proj"]), r"LOHA.*merge_and_unload"),
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "PROMPT_TUNING changes no weight",
        ),
    ):
        with pytest.raises(pf.CheckpointError, match=message):
            pf.stack(base, {"x": peft.get_peft_model(copy.deepcopy(base), config)})
    injected = peft.inject_adapter_in_model(peft.LoHaConfig(target_modules=["q_proj"]), copy.deepcopy(base))
    with pytest.raises(pf.CheckpointError, match=r"LOHA|LoHa"):
        pf.stack(base, {"x": injected})
    with pytest.raises(pf.CheckpointError, match=r"has no tensor .*|changes .*pass the model"):
        pf.stack(tiny_gpt2(), {"x": wrapped(base, **Q)})
    other = wrapped(roberta(), target_modules=["query"])
    with pytest.raises(pf.CheckpointError, match="has no tensor"):
        pf.stack(base, {"x": other})
