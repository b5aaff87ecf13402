"""Mixture-of-experts models: experts ranked by the change of their router vectors' norms, and gone for good."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fasticl
from fasticl.cli import app
from fasticl.prune import Magnitude, NeuronActivation, RouterNorm, SparseGPT, Wanda, sparsify_

transformers = pytest.importorskip("transformers", minversion="5")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=8)),
    "olmoe": lambda: transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SIZES, num_experts=8)),
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SIZES, num_experts=8, moe_intermediate_size=20, shared_expert_intermediate_size=28, mlp_only_layers=[1]
        )
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=20, head_dim=8, norm_topk_prob=True)
    ),
}


def pair(architecture: str) -> tuple[Any, Any]:
    """A model as it is before fine-tuning, and after: with other weights everywhere."""
    before, after = (ARCHITECTURES[architecture]().eval() for _ in range(2))
    with torch.no_grad():
        for router in (*routers(before), *routers(after)):
            router.weight.normal_()
    return before, after


def routers(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def expected_removals(before: Any, after: Any, count: int) -> list[tuple[int, ...]]:
    """The definition: in each layer the smallest signed differences of 2-norms."""
    removed = []
    for old, new in zip(routers(before), routers(after), strict=True):
        norms = [np.sqrt((r.weight.detach().double().numpy() ** 2).sum(1)) for r in (new, old)]
        removed.append(tuple(sorted(np.argsort(norms[0] - norms[1])[:count].tolist())))
    return removed


def without(removed: tuple[int, ...]) -> Any:
    """A forward hook on a router: its own arithmetic, in torch's words, with logits of ``-inf`` for some experts."""

    def hook(router: Any, inputs: tuple[torch.Tensor], _: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = inputs[0].flatten(0, -2) @ router.weight.T
        logits[:, list(removed)] = -torch.inf
        scores, chosen = logits.softmax(-1).topk(router.top_k)
        if getattr(router, "norm_topk_prob", True):  # Mixtral always does
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, scores, chosen

    return hook


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_removed_experts_are_as_if_their_logits_were_minus_infinity(architecture: str) -> None:
    before, after = pair(architecture)
    expected = copy.deepcopy(after)
    weights = sum(p.numel() for p in after.parameters())
    report = sparsify_(after, RouterNorm(0.5, before))

    removed = [layer.removed for layer in report.layers]
    assert removed == expected_removals(before, expected, 4)
    assert len(set(removed)) > 1, "expected layers that differ"
    names = [f"model.layers.{i}.mlp.experts" for i in range(3) if architecture != "qwen2_moe" or i != 1]
    assert [layer.name for layer in report.layers] == names
    assert (report.layers[0].before, report.total) == (0, 0.5)
    gone = sum(layer.zeros_after + 4 * 32 for layer in report.layers)  # experts, and their rows of the routers
    assert sum(p.numel() for p in after.parameters()) == weights - gone

    x = torch.randint(61, (3, 17))
    with torch.no_grad():
        grouped = after(x).logits
        for model in (after, expected):
            model.set_experts_implementation("eager")  # others want float32
            model.double()
        dense = expected(x).logits
        for router, experts in zip(routers(expected), removed, strict=True):
            router.register_forward_hook(without(experts))
        truth = expected(x).logits
        assert (dense - truth).abs().max() > 1e-3, "the removed experts made no difference"
        torch.testing.assert_close(after(x).logits, truth, rtol=1e-5, atol=1e-6)  # transformers' softmax is float32
        torch.testing.assert_close(grouped.double(), truth, rtol=1e-4, atol=1e-5)


def test_the_change_has_a_sign_and_is_one_of_norms() -> None:
    """Shrinking counts less than staying, turning is no change, and the earlier of equals stay."""
    before, after = pair("mixtral")
    # The second expert grows, the fourth turns round, the fifth grows most: changes -5, .5, 0, 0, .75, 0, -.5, 0.
    start = [9.0, 1.0, 7.0, 2.0, 0.5, 4.0, 3.0, 4.0]
    end = [4.0, 1.5, 7.0, -2.0, 1.25, 4.0, 2.5, 4.0]
    with torch.no_grad():
        for old, new in zip(routers(before), routers(after), strict=True):
            old.weight.copy_(torch.eye(8, 32) * torch.tensor(start)[:, None])
            new.weight.copy_(torch.eye(8, 32) * torch.tensor(end)[:, None])
    for sparsity, removed in ((0.0, ()), (0.125, (0,)), (0.25, (0, 6)), (0.4, (0, 6, 7)), (0.6, (0, 3, 5, 6, 7))):
        report = sparsify_(copy.deepcopy(after), RouterNorm(sparsity, before))
        assert {layer.removed for layer in report.layers} == {removed}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saves_and_loads_without_fasticl(architecture: str, tmp_path: Path) -> None:
    before, after = pair(architecture)
    before.save_pretrained(tmp_path / "before", max_shard_size="20KB")
    assert len(list((tmp_path / "before").glob("*.safetensors"))) > 1
    by_model = sparsify_(copy.deepcopy(after), RouterNorm(0.25, before))
    by_folder = sparsify_(after, RouterNorm(0.25, tmp_path / "before"))
    assert [layer.removed for layer in by_folder.layers] == [layer.removed for layer in by_model.layers]

    after.save_pretrained(tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert {config.get("num_experts"), config.get("num_local_experts")} == {6, None}
    assert "quantization_config" not in config
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    x = torch.randint(61, (2, 9))
    with torch.no_grad():  # the auxiliary loss counts experts
        ours, theirs = (model(x, labels=x, output_router_logits=True) for model in (after, loaded))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.aux_loss, theirs.aux_loss)
    with torch.no_grad():
        for router in routers(loaded):
            router.weight.normal_()
    assert {len(layer.removed) for layer in sparsify_(loaded, RouterNorm(0.5, after)).layers} == {3}


def test_a_base_model_may_be_where_a_language_model_began(tmp_path: Path) -> None:
    before, after = pair("qwen3_moe")
    before.model.save_pretrained(tmp_path)
    removed = expected_removals(before, after, 2)
    for pretrained in (before.model, tmp_path, str(tmp_path)):
        report = sparsify_(copy.deepcopy(after), RouterNorm(0.25, pretrained))
        assert [layer.removed for layer in report.layers] == removed
    assert [layer.removed for layer in sparsify_(after.model, RouterNorm(0.25, before)).layers] == removed


def test_zeros_of_the_experts_that_stay_count() -> None:
    before, after = pair("mixtral")
    with torch.no_grad():
        for router in routers(after)[:1]:
            router.weight[0] *= 100  # stays
        after.model.layers[0].mlp.experts.down_proj[0] = 0
    row = sparsify_(after, RouterNorm(0.25, before)).layers[0]
    assert row.shape == (8, 3 * 24 * 32)
    assert (row.zeros_before, row.zeros_after) == (24 * 32, 24 * 32 + 2 * 3 * 24 * 32)


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SIZES, "num_experts_per_tok": None}, tie_word_embeddings=True)
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RouterNorm(1.0, nn.Identity()), ValueError, r"sparsity in \[0, 1\), got 1.0"),
        (lambda: RouterNorm("1", nn.Identity()), TypeError, "sparsity to be a number, got str"),
        (lambda: RouterNorm(0.5, None), TypeError, "pretrained to be the model .* or its folder, got NoneType"),
    ],
)
def test_config_errors(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def broken(model: Any, break_: Any) -> Any:
    with torch.no_grad():
        break_(model.model.layers[2].mlp)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda before, after: (after, after, 0.5), "layers.0.mlp.experts: expected a router that fine-tuning changed"),
        (lambda before, after: (after, before, 0.75), r"at least 3 experts .*num_experts_per_tok\), got 2 of 8"),
        (lambda before, after: (llama(), before, 0.5), "type mixtral, .*, got LlamaForCausalLM of type llama"),
        (lambda before, after: (nn.Linear(2, 2), before, 0.5), "type mixtral, .*, got Linear$"),
        (lambda before, after: (after, llama(), 0.5), "type mixtral, .*, got LlamaForCausalLM of type llama"),
        (lambda before, after: (after, "nowhere", 0.5), "a model or the folder of one, got nowhere"),
        (
            lambda before, after: (after, broken(before, lambda mlp: mlp.gate.weight.fill_(torch.nan)), 0.5),
            "layers.2.mlp.experts: expected routers of finite weights",
        ),
        (
            lambda before, after: (
                broken(after, lambda mlp: setattr(mlp.gate, "bias", nn.Parameter(torch.zeros(8)))),
                before,
                0.5,
            ),
            r"layers.2.mlp.experts, with its router: expected parameters \{.*\}, got \{.*'bias': \[8\]",
        ),
        (
            lambda before, after: (broken(after, lambda mlp: mlp.experts.to("meta")), before, 0.5),
            "layers.2.mlp.experts, with its router: expected floating-point data in gate_up_proj, got none",
        ),
    ],
)
def test_errors_change_nothing(change: Any, message: str) -> None:
    model, pretrained, sparsity = change(*pair("mixtral"))
    kept = copy.deepcopy(model).state_dict()
    with pytest.raises(ValueError, match=message):
        sparsify_(model, RouterNorm(sparsity, pretrained))
    assert model.state_dict().keys() == kept.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, kept[name])
    assert getattr(getattr(model, "config", None), "num_local_experts", 8) == 8


def test_a_pretrained_model_of_another_size(tmp_path: Path) -> None:
    before, after = pair("mixtral")
    smaller = copy.deepcopy(before)
    sparsify_(smaller, RouterNorm(0.5, after))
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts: expected a pretrained router \[8, 32\], got \[4, 32\]"
    ):
        sparsify_(after, RouterNorm(0.5, smaller))
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts: expected a pretrained router \[8, 32\], got none"):
        sparsify_(after, RouterNorm(0.5, tmp_path))
    with pytest.raises(ValueError, match="filter_fn None with RouterNorm"):
        sparsify_(after, RouterNorm(0.5, before), filter_fn=lambda module, name: True)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("config", [Magnitude(0.5), Wanda(0.5), SparseGPT(0.5)], ids=lambda c: type(c).__name__)
def test_other_methods_prune_the_linears_and_say_so(
    architecture: str, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts, routers and the gate of a shared expert stay as they are; what was packed saves and loads."""
    monkeypatch.setattr(importlib.import_module("fasticl.convert"), "SECONDS", 1e-3)
    model = pair(architecture)[0]
    dense = copy.deepcopy(model).state_dict()
    stacked = sum(tensor.numel() for tensor in dense.values() if tensor.dim() == 3)
    x = torch.randint(61, (4, 16))
    with pytest.warns(
        UserWarning, match=f"{type(config).__name__} prunes no experts .* {stacked:,} weights stay dense"
    ):
        report = sparsify_(model, config, [x])
    pruned = {f"{layer.name}.weight" for layer in report.layers}
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, dense[name])} == pruned
    kinds = {name.split(".")[-2] for name in pruned}
    mlps = {"gate_proj", "up_proj", "down_proj"} if architecture == "qwen2_moe" else set()
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", *mlps}

    with torch.no_grad():
        masked = model(x).logits
        converted = fasticl.convert(model, min_speedup=0, tokens=(1,))
        assert len(converted.converted) == len(pruned)
        torch.testing.assert_close(model(x).logits, masked, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=0)


def test_neurons_of_shared_experts_alone_can_go() -> None:
    x = torch.randint(61, (4, 16))
    with (
        pytest.warns(UserWarning, match="NeuronActivation prunes no experts"),
        pytest.raises(ValueError, match="got none in MixtralForCausalLM"),
    ):
        sparsify_(pair("mixtral")[0], NeuronActivation(0.5), [x])
    with pytest.warns(UserWarning, match="NeuronActivation prunes no experts"):
        report = sparsify_(pair("qwen2_moe")[0], NeuronActivation(0.5), [x])
    assert {row.name.rpartition(".")[0] for row in report.layers} == {
        "model.layers.0.mlp.shared_expert",
        "model.layers.1.mlp",
        "model.layers.2.mlp.shared_expert",
    }


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    before, after = pair("mixtral")
    before.save_pretrained(path / "before")
    after.save_pretrained(path / "after")
    llama().save_pretrained(path / "llama")
    return path


def prune(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def test_cli(folders: Path, tmp_path: Path) -> None:
    method = ("--method", "router-norm", "--sparsity", "0.25", "--pretrained", folders / "before")
    result = prune(folders / "after", tmp_path / "out", *method)
    assert result.exit_code == 0, result.stderr
    assert "model.layers.2.mlp.experts  8x2304    0.0%  25.0%  expert   RouterNorm" in result.stdout
    assert "25.0% of the experts' weights of 3 layers are gone from" in result.stdout
    as_json = prune(folders / "after", tmp_path / "json", *method, "--json")
    before, after, out = (
        transformers.AutoModelForCausalLM.from_pretrained(path)
        for path in (folders / "before", folders / "after", tmp_path / "out")
    )
    found = json.loads(as_json.stdout)
    assert found["sparsity"] == 0.25
    assert [tuple(layer["removed"]) for layer in found["layers"]] == expected_removals(before, after, 2)
    sparsify_(after, RouterNorm(0.25, before))
    x = torch.randint(61, (2, 9))
    with torch.no_grad():
        assert torch.equal(out(x).logits, after(x).logits)


@pytest.mark.parametrize(
    ("model", "arguments", "code", "message"),
    [
        ("after", ("router-norm", "0.25"), 2, "expected a model's folder with router-norm"),
        ("after", ("magnitude", "0.25", "--pretrained", "before"), 2, "expected no folder with magnitude"),
        ("after", ("router-norm", "0.25", "--pretrained", "before", "--pattern", "neuron"), 2, "got neuron"),
        ("after", ("router-norm", "0.25", "--pretrained", "nowhere"), 2, "does not exist"),
        ("after", ("router-norm", "0.25", "--pretrained", "after"), 1, "expected a router that fine-tuning changed"),
        ("after", ("router-norm", "0.7", "--pretrained", "before"), 1, "expected at least 3 experts to stay"),
        ("after", ("router-norm", "0.25", "--pretrained", "."), 1, "model.safetensors: expected a whole safetensors"),
        ("llama", ("router-norm", "0.25", "--pretrained", "before"), 1, "got LlamaForCausalLM of type llama"),
    ],
)
def test_cli_errors(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(folders)
    monkeypatch.setenv("COLUMNS", "300")
    method, sparsity, *rest = arguments
    result = prune(model, tmp_path / "out", "--method", method, "--sparsity", sparsity, *rest)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
