"""Tensor parallelism: two processes compute what one does, each with half of the weights."""

from __future__ import annotations

import copy
import datetime
import importlib
import inspect
import json
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

import fasticl
from fasticl import checkpoint, parallel
from fasticl.nn import SparseLinear, SparseMLP
from fasticl.timing import Timing

transformers = pytest.importorskip("transformers", minversion="5")

PROCESSES = 2
# Odd where it may be: before 5.23, transformers loads in parts only a head that the processes divide.
VOCABULARY = 91 if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23) else 92
COMMON = {
    "hidden_size": 96, "intermediate_size": 178, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None,
}  # fmt: skip
NEOX = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
CONFIGS: dict[str, Callable[[], Any]] = {  # what is different in each
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),  # biases of q, k, v; a tied head
    "llama": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),  # of o and down too
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX),  # q, k, v in one, by heads
    "phi": lambda: transformers.PhiConfig(**COMMON),  # a bias of the head
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, head_dim=24),  # embeddings that are scaled; head norms
    "phi3": lambda: transformers.Phi3Config(**COMMON),  # outputs gathered, inputs taken apart
}


def untimed(contenders: Mapping[str, Sequence[Any]], **_: object) -> dict[str, Timing]:
    """Stands in for the timing: what is packed is fast."""
    return {name: Timing(*[2.0 if name == "dense" else 1.0] * 3, 1, 1) for name in contenders}


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, the same in each process, whose biases matter."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model


def packed(model: Any, config: Any = None, **kwargs: Any) -> Any:
    head = "lm_head" not in kwargs.get("skip", ("lm_head",))
    fasticl.sparsify_(model, config or fasticl.Magnitude(0.5), filter_fn=(lambda module, name: True) if head else None)
    fasticl.convert(model, min_speedup=0, tokens=(1,), **kwargs)
    return model


def tokens() -> Tensor:
    return torch.arange(14).view(2, 7) * 6


def assert_same_outputs(split: Any, whole: Any, tolerance: float = 2e-6) -> None:
    with torch.inference_mode():
        expected, logits = whole(tokens()).logits, split(tokens()).logits
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(split.generate(tokens(), **options), whole.generate(tokens(), **options))


def held(model: nn.Module) -> int:
    """Bytes of the linears and embeddings, of packed layouts too; biases, which are small, do not count."""
    storages = {}
    for module in model.modules():
        if isinstance(module, SparseLinear):
            tensors = module.packed._tensors()
        else:
            weight = getattr(module, "weight", None)
            weight = weight.to_local() if hasattr(weight, "to_local") else weight
            tensors = [weight] if isinstance(weight, Tensor) and weight.dim() == 2 else []
        storages |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def assert_halved(split: nn.Module, whole: nn.Module) -> None:
    """Each process has about half of the stored values of every packed layer, and both together have all."""
    weights = [
        {name: module.packed for name, module in model.named_modules() if isinstance(module, SparseLinear)}
        for model in (split, whole)
    ]
    assert weights[0].keys() == weights[1].keys()
    counts = torch.tensor([packed.values.numel() for packed in weights[0].values()])
    all_counts = torch.tensor([packed.values.numel() for packed in weights[1].values()])
    assert (counts <= 0.6 * all_counts).all(), dict(zip(weights[0], (counts / all_counts).tolist(), strict=True))
    dist.all_reduce(counts)
    assert torch.equal(counts, all_counts)
    ours, theirs = (sum(packed.bytes for packed in each.values()) for each in weights)
    assert ours <= 0.55 * theirs, (ours, theirs)
    for packed in weights[0].values():
        for tensor in packed._tensors():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


# ---- in two processes ------------------------------------------------------------------------------------------------


def families(folder: Path) -> None:
    for family in CONFIGS:
        whole = packed(make(family))
        split = fasticl.parallelize(copy.deepcopy(whole))
        assert_halved(split, whole)
        assert_same_outputs(split, whole)


def int8_and_the_head(folder: Path) -> None:
    whole = packed(make("llama"), values="int8", skip=())
    split = fasticl.parallelize(copy.deepcopy(whole))
    assert split.lm_head.scales.shape == (46 - (VOCABULARY % 2) * dist.get_rank(),)
    assert_halved(split, whole)
    assert_same_outputs(split, whole)


def bfloat16(folder: Path) -> None:
    whole = packed(make("llama", torch.bfloat16))
    split = fasticl.parallelize(copy.deepcopy(whole))
    with torch.inference_mode():
        truth = copy.deepcopy(whole).float()(tokens()).logits
        ours, theirs = ((model(tokens()).logits - truth).abs().max() for model in (split, whole))
    assert ours <= 2 * theirs


def removed_neurons(folder: Path) -> None:
    whole = packed(make("llama"), fasticl.Magnitude(0.3, "neuron"))
    mlp = whole.model.layers[0].mlp
    assert isinstance(mlp, SparseMLP)
    assert mlp.up.out_features < COMMON["intermediate_size"]
    plan = {"model.embed_tokens": "embedding_rowwise", **whole.tp_plan}  # which plans before transformers 5.23 lack
    split = fasticl.parallelize(copy.deepcopy(whole), plan=plan)
    assert_same_outputs(split, whole)
    assert held(split) <= 0.52 * held(whole)


def a_dense_model(folder: Path) -> None:
    whole = make("qwen2")
    split = fasticl.parallelize(copy.deepcopy(whole))
    head, embedding = split.lm_head.weight, split.model.embed_tokens.weight
    assert head.data_ptr() == embedding.data_ptr()  # still tied
    assert_same_outputs(split, whole)
    assert held(split) <= 0.51 * held(whole)
    assert torch.equal(
        split.generate(tokens(), max_new_tokens=4, do_sample=False, cache_implementation="static"),
        whole.generate(tokens(), max_new_tokens=4, do_sample=False),
    )


GPT2_PLAN = {"transformer.h.*.mlp.c_fc": "colwise", "transformer.h.*.mlp.c_proj": "rowwise"}


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=36, n_layer=2, n_head=2, n_inner=45, vocab_size=90, n_positions=64,
                                     bos_token_id=0, eos_token_id=None)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for block in model.transformer.h:
        nn.init.normal_(block.mlp.c_fc.bias)
        nn.init.normal_(block.mlp.c_proj.bias)
    return model


def a_plan_of_ones_own(folder: Path) -> None:
    """GPT-2 has no plan; its MLPs can be split, Conv1D, packed or fused, and its attention stays whole."""
    for prune, fused in ((False, False), (True, True), (True, False)):
        whole = gpt2()
        whole = packed(whole, skip=("lm_head",) if fused else ("lm_head", "c_fc")) if prune else whole
        split = fasticl.parallelize(copy.deepcopy(whole), plan=GPT2_PLAN)
        for block in split.transformer.h:
            assert isinstance(block.mlp, SparseMLP) == fused
            up = block.mlp.up if fused else block.mlp.c_fc
            assert up.out_features == 23 - dist.get_rank()
        assert_same_outputs(split, whole)


class TwoInOne(nn.Module):
    """up and gate in one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(9, 38), nn.Linear(19, 9)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(gate.sigmoid() * up)


def every_format(folder: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 9, dtype=torch.float64)
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for format, values in (
        ("bitmap", None),
        ("sliced", None),
        ("compact", None),
        ("bitmap", "int8"),
        ("dense", "int8"),
    ):
        whole = TwoInOne().double()
        for name in ("both", "down"):
            linear = getattr(whole, name)
            with torch.no_grad():
                linear.weight[torch.rand(linear.weight.shape) < 0.6] = 0
                linear.weight[3], linear.weight[:, 4] = 0, 0
            setattr(whole, name, SparseLinear.from_linear(linear, format, values))
        plan = {"both": "packed_colwise", "down": "rowwise"}
        split = fasticl.parallelize(copy.deepcopy(whole), mesh, plan)
        with torch.inference_mode():
            torch.testing.assert_close(split(x), whole(x), rtol=1e-12, atol=1e-12)


def saved(whole: Any, folder: Path, name: str, **options: Any) -> Path:
    if dist.get_rank() == 0:
        fasticl.save_pretrained(whole, folder / name, **options)
    dist.barrier()
    return folder / name


def load(folder: Path, **options: Any) -> Any:
    config = transformers.distributed.DistributedConfig(**{"tp_size": PROCESSES, **options})
    return fasticl.from_pretrained(folder, distributed_config=config)


def loaded_in_parts(folder: Path) -> None:
    """from_pretrained of transformers; no process holds more than one layer whole."""
    read: list[weakref.ref[Any]] = []

    def from_bitmask(*args: Any) -> Any:
        assert not any(each() is not None for each in read), "another whole layer is still held"
        whole = original(*args)
        read.append(weakref.ref(whole))
        return whole

    cases = {
        "qwen2": packed(make("qwen2")),
        "partly": packed(make("llama"), skip=("lm_head", "0", "down_proj")),  # layers that transformers splits beside
        "int8": packed(make("gemma3"), values="int8", skip=()),
        "neurons": packed(make("llama"), fasticl.Magnitude(0.3, "neuron")),  # a fused MLP of dense linears
        "phi3": packed(make("phi3")),
        "gpt_neox": packed(make("gpt_neox")),
        "phi": packed(make("phi")),
        "gpt2": packed(gpt2()),
        "bitmask": packed(make("llama"), format="bitmap"),
    }
    for name, whole in cases.items():
        of_files = {"phi": {"max_shard_size": "50KB"}, "bitmask": {"format": "sparse-bitmask"}}.get(name, {})
        path = saved(whole, folder, name, **of_files)
        assert (len(list(path.glob("*.safetensors"))) > 1) == (name == "phi")
        original, checkpoint.from_bitmask = checkpoint.from_bitmask, from_bitmask
        try:
            split = load(path, **({"tp_plan": GPT2_PLAN} if name == "gpt2" else {}))
        finally:
            checkpoint.from_bitmask = original
        if name == "gpt2":
            assert split.transformer.h[1].mlp.up.out_features == 23 - dist.get_rank()
        elif name == "bitmask":  # which knows of no MLPs in one op
            assert split.model.layers[1].mlp.down_proj.in_features == 89
        else:
            assert_halved(split, whole)
        assert_same_outputs(split, whole)
    assert len(read) > 14


def what_cannot_be_loaded_in_parts(folder: Path) -> None:
    heads = transformers.LlamaConfig(**COMMON | {"num_key_value_heads": 1})
    model = packed(transformers.AutoModelForCausalLM.from_config(heads).eval())
    with pytest.raises(ValueError, match=r"expected num_key_value_heads divisible by 2 processes, got 1"):
        load(saved(model, folder, "heads"))
    with pytest.raises(ValueError, match=r"fsdp_size: expected 1 for a packed model"):
        load(folder / "heads", tp_size=1, fsdp_size=PROCESSES)
    coded = saved(packed(make("llama").bfloat16()), folder, "coded", compress=True)
    with pytest.raises(ValueError, match="tp_size: expected files without compress=True, got compressed ones"):
        load(coded)


def what_a_part_cannot_do(folder: Path) -> None:
    whole = packed(make("llama"))
    split = fasticl.parallelize(copy.deepcopy(whole))
    loaded = load(saved(whole, folder, "part"))
    for part in (split, loaded):
        with pytest.raises(ValueError, match="expected a whole model to decode with, got one process's part of 2"):
            fasticl.Decoder(part)
        with pytest.raises(ValueError, match="expected a whole model to be saved, got one process's part of 2"):
            part.save_pretrained(folder / f"not{dist.get_rank()}")
        with pytest.raises(ValueError, match="expected a whole model to be split, got one process's part of 2"):
            fasticl.parallelize(part)
        with pytest.raises(ValueError, match="expected no gradients"):
            part(inputs_embeds=torch.randn(1, 3, 96, requires_grad=True))
        dist.barrier()
    dense = fasticl.parallelize(make("llama"))
    with pytest.raises(ValueError, match="expected a whole model to be saved"):
        dense.save_pretrained(folder / f"not{dist.get_rank()}")


def models_that_differ(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 10 + dist.get_rank()), nn.ReLU(), nn.Linear(10 + dist.get_rank(), 8))
    with pytest.raises(ValueError, match=r"^0: expected the same sizes in each process, got \[10, 8\], \[11, 8\]"):
        fasticl.parallelize(model, plan={"0": "colwise", "2": "rowwise"})


CHECKS = [
    families, int8_and_the_head, bfloat16, removed_neurons, a_dense_model, a_plan_of_ones_own, every_format,
    models_that_differ,
]  # fmt: skip
if (
    "src_data_rank" in inspect.signature(distribute_tensor).parameters
):  # transformers loads parts on torch 2.7 and newer
    CHECKS += [loaded_in_parts, what_cannot_be_loaded_in_parts, what_a_part_cannot_do]


def process(rank: int, folder: Path) -> None:
    """Runs all checks, until one fails; for each writes what it raised."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    importlib.import_module("fasticl.convert").interleaved = untimed  # type: ignore[attr-defined]
    timeout = datetime.timedelta(seconds=60)
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=timeout)
    outcomes = {}
    for check in CHECKS:
        try:
            check(folder)
            outcomes[check.__name__] = ""
        except BaseException:
            outcomes[check.__name__] = traceback.format_exc()
            break  # the other process may wait for a part of it
    (folder / f"{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (folder,), nprocs=PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_two_processes(check: Callable[[Path], None], outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(check.__name__, "not run: a check before it failed") == "", f"process {rank}"


# ---- in this one -----------------------------------------------------------------------------------------------------


class Mesh:
    """What the code asks of a DeviceMesh, for a process of a given rank; there are no others."""

    ndim = 1

    def __init__(self, size: int = 2, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def get_local_rank(self) -> int:
        return self._rank


@pytest.mark.parametrize("kind", ["Linear", "bitmap", "compact", "dense"])
def test_parts_make_the_whole(kind: str) -> None:
    """Rows one below the other; columns side by side, the bias in one of them; sizes that 3 does not divide."""
    linear: Any = nn.Linear(17, 20)
    with torch.no_grad():
        linear.weight[torch.rand(20, 17) < 0.5] = 0
    if kind != "Linear":
        linear = SparseLinear.from_linear(linear, kind, "int8" if kind == "dense" else None)
    weight = fasticl.nn.dense_weight(linear)
    rows = [parallel.split(linear, parallel.COLWISE, Mesh(3, rank)) for rank in range(3)]  # type: ignore[arg-type]
    columns = [parallel.split(linear, parallel.ROWWISE, Mesh(3, rank)) for rank in range(3)]  # type: ignore[arg-type]
    assert [part.out_features for part in rows] == [7, 7, 6]
    assert [part.in_features for part in columns] == [6, 6, 5]
    dense = [[fasticl.nn.dense_weight(part) for part in parts] for parts in (rows, columns)]
    assert torch.equal(torch.cat(dense[0]), weight)
    assert torch.equal(torch.cat(dense[1], 1), weight)
    assert torch.equal(torch.cat([part.bias for part in rows]), linear.bias)
    assert [part.bias is None for part in columns] == [False, True, True]
    assert torch.equal(columns[0].bias, linear.bias)


def test_more_processes_than_rows() -> None:
    parts = [parallel.part(3, Mesh(5, rank)).tolist() for rank in range(5)]  # type: ignore[arg-type]
    assert parts == [[0], [1], [2], [], []]
    assert parallel.part(12, Mesh(2, 1), groups=2).tolist() == [3, 4, 5, 9, 10, 11]  # type: ignore[arg-type]


def test_a_program_of_one_process_keeps_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    model = make("llama")
    before = dict(model.named_modules())
    assert fasticl.parallelize(model) is model
    assert dict(model.named_modules()) == before


def fused() -> nn.Module:
    mlp = SparseMLP(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16), activation="silu")
    return nn.ModuleDict({"mlp": mlp})


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "plan", "error", "message"),
    [
        ([], {}, TypeError, "model: expected a torch.nn.Module, got list"),
        (nn.Linear(8, 8), None, ValueError, "plan: expected layers .*, as Linear has no tp_plan; got none"),
        (nn.Sequential(nn.Linear(8, 8)), {"0": "sideways"}, ValueError, "0: expected a style of colwise, .*'sideways'"),
        (nn.Sequential(nn.Linear(8, 8)), {"1": "colwise"}, ValueError, "layers of Sequential, which has no 1"),
        (nn.Sequential(nn.LayerNorm(8)), {"*": "colwise"}, TypeError, "0: expected a linear to split, got LayerNorm"),
        (nn.Sequential(nn.Linear(8, 8)), {"0": "embedding_rowwise"}, TypeError, "0: expected an embedding to split"),
        (nn.Sequential(nn.Linear(8, 8)), {"0.weight": "colwise"}, TypeError, "0.weight: .*, got a parameter"),
        (hooked(), {"0": "colwise"}, TypeError, "0: expected a layer that .*, got one that has hooks"),
        (fused(), {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}, ValueError, "mlp: expected the plan"),
    ],
)  # fmt: skip
def test_refused(model: Any, plan: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fasticl.parallelize(model, Mesh(), plan)  # type: ignore[arg-type]


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn: expected num_attention_heads divisible by 3 .* 4"):
        fasticl.parallelize(make("llama"), Mesh(3))  # type: ignore[arg-type]


def test_a_mesh_of_two_dimensions_is_refused() -> None:
    mesh = Mesh()
    mesh.ndim = 2
    with pytest.raises(ValueError, match="mesh: expected 1 dimension, got 2"):
        fasticl.parallelize(make("llama"), mesh)  # type: ignore[arg-type]
