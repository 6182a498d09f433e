"""What other libraries do to a model before and after inject, run live.

The worst outcome is an adapter that silently does nothing.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorainject as li

from compilers import needs_compiler
from models import bits, ids, llama, randomize, run, state
from moe_models import mixtral, moe_model, moe_output

X = {"input_ids": ids(), "use_cache": False}
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]


def adapted(model: nn.Module | None = None) -> nn.Module:
    """Return a model with adapters that change its output."""
    model = li.inject(llama() if model is None else model, TARGETS, r=4, alpha=8)
    randomize(model)
    return model


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return llama()


@pytest.fixture
def expected(base: nn.Module) -> torch.Tensor:
    """The output of the adapted model when no other library interferes."""
    return run(adapted(copy.deepcopy(base)), X).detach()


def offload(model: nn.Module, how: str, folder: str) -> nn.Module:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    if how == "device_map":
        return dispatch_model(model, {"": "cpu"}, force_hooks=True)
    return cpu_offload(model, "cpu") if how == "cpu" else disk_offload(model, folder, "cpu")


@pytest.mark.parametrize("how", ["device_map", "cpu", "disk"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hooks_and_offload_keep_the_adapters(base, expected, how, when, tmp_path):
    """Under accelerate's hooks and offload, before or after inject, the adapters act, and eject restores the base."""
    plain = run(base, X)
    if when == "before":
        model = adapted(offload(base, how, tmp_path))
    else:
        model = offload(adapted(base), how, tmp_path)
    with torch.no_grad():
        assert torch.allclose(run(model, X), expected, atol=1e-6)
        with li.disabled(model):
            assert torch.equal(run(model, X), plain)
        li.eject(model)
        assert torch.equal(run(model, X), plain)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_training_is_refused_if_the_adapters_are_offloaded(base, how, tmp_path):
    """accelerate drops the gradients of A and B that it offloads: the first training forward names the site and the way
    out. Offloading before inject trains."""
    model = offload(adapted(base), how, tmp_path)
    with pytest.raises(li.StateError, match=r"embed_tokens: accelerate offloads A and B, and drops their gradients"):
        run(model, X)


def test_offloaded_experts_are_not_trained_either(tmp_path):
    """The refusal reaches adapters on weights that the model's own code reads."""
    model = offload(li.inject(mixtral(), ["experts"], r=2), "cpu", tmp_path)
    with pytest.raises(li.StateError, match=r"experts\.\w+: accelerate offloads A and B"):
        run(model, X)


def test_gradients_are_the_same_with_an_offloaded_base(base, tmp_path):
    """A and B get the same gradients whether or not the base is offloaded to the CPU."""
    model = adapted(copy.deepcopy(base))
    run(model, X).square().sum().backward()
    hooked = adapted(offload(base, "cpu", tmp_path))
    run(hooked, X).square().sum().backward()
    for p, q in zip(li.parameters(model), li.parameters(hooked), strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_eject_restores_the_forward_after_hooks_came_and_went(base):
    """Hooks of accelerate that were added after inject and removed leave no grafted forward on the module."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    q = base.model.layers[0].self_attn.q_proj
    adapted(base)
    add_hook_to_module(q, ModelHook())
    remove_hook_from_module(q)
    li.eject(base)
    assert type(q) is nn.Linear
    assert q.forward.__func__ is nn.Linear.forward


def test_merge_under_accelerate_hooks(base, expected):
    """Merge and unmerge change classes, although the hooks hold a bound forward."""
    model = adapted(offload(base, "device_map", ""))
    li.merge(model)
    assert torch.allclose(run(model, X), expected, atol=1e-5)
    li.unmerge(model)
    assert torch.allclose(run(model, X), expected, atol=1e-6)


def test_merge_and_save_of_offloaded_weights_are_refused(base, tmp_path):
    """Weights that are offloaded cannot be merged or saved: the error names them, and nothing is changed."""
    model = offload(adapted(base), "cpu", tmp_path)
    with torch.no_grad():
        before = run(model, X)
    with pytest.raises(li.MergeError, match=r"q_proj: is on the meta device"):
        li.merge(model)
    with pytest.raises(li.FileError, match=r"meta device"):
        li.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with torch.no_grad():
        assert torch.equal(run(model, X), before)


def test_foreign_forward_on_the_instance_is_refused(base):
    """A forward that was replaced on the module would bypass the adapter: inject, merge and eject name the module."""
    q = base.model.layers[0].self_attn.q_proj
    q.forward = lambda x: nn.functional.linear(x, q.weight)
    before = state(base)
    with pytest.raises(
        li.TargetError, match=r"layers\.0\.self_attn\.q_proj: its forward is replaced on the instance by .*lambda"
    ):
        li.inject(base, ["q_proj"])
    assert state(base) == before
    del q.forward
    q._original_forward = q.forward  # a patch that keeps the original bypasses the adapter, too
    q.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight), q)
    with pytest.raises(li.TargetError, match=r"its forward is replaced on the instance"):
        li.inject(base, ["q_proj"])
    del q.forward, q._original_forward
    adapted(base)
    bound = q.forward
    q.forward = lambda x: bound(x)
    before = state(base)
    with pytest.raises(li.GraftError, match=r"q_proj: its forward is replaced"):
        li.eject(base)
    with pytest.raises(li.MergeError, match=r"q_proj: its forward is replaced"):
        li.merge(base)
    assert state(base) == before


def test_torch_compile_makes_one_graph_that_follows_every_change(base, expected):
    """The adapted model compiles without a graph break, and other A and B, disabled and merge all take effect."""
    model = adapted(base)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**X).logits, expected, atol=1e-5)
    randomize(model, seed=5)
    assert torch.allclose(compiled(**X).logits, run(model, X), atol=1e-5)
    with li.disabled(model):
        assert torch.allclose(compiled(**X).logits, run(model, X), atol=1e-5)
    li.merge(model)
    assert torch.allclose(compiled(**X).logits, run(model, X), atol=1e-5)


@pytest.mark.long
@needs_compiler
def test_torch_compile_with_inductor_agrees_with_eager(base, expected):
    """The compiled layer has the gradients of the layer in eager mode."""
    model = adapted(base)
    block = model.model.layers[0].mlp.down_proj
    x = torch.randn(4, 48)
    loss = torch.compile(block, fullgraph=True)(x).square().sum()
    loss.backward()
    grads = [p.grad.clone() for p in block.lora.parameters()]
    model.zero_grad()
    block(x).square().sum().backward()
    assert all(
        torch.allclose(g, p.grad, rtol=1e-4, atol=1e-5) for g, p in zip(grads, block.lora.parameters(), strict=True)
    )


def test_twelve_blocks_are_compiled_as_often_as_the_base():
    """Grafted classes are cached per base class, so twelve blocks need no more compilations than the base's twelve."""

    def compilations(model: nn.Module) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        for layer in model.model.layers:
            layer.compile(backend=counter, fullgraph=True)
        with torch.no_grad():
            run(model, X)
        torch._dynamo.reset()
        return counter.frame_count

    assert compilations(adapted(llama(num_hidden_layers=12))) <= max(2, compilations(llama(num_hidden_layers=12)))


def test_inject_reaches_into_a_compiled_model(base, expected):
    """Paths leave out torch.compile's wrapper, and what was compiled before inject is compiled again."""
    compiled = torch.compile(base, backend="eager")
    run(compiled, X)
    assert {s.path for s in li.find(compiled, ["q_proj"])} == {s.path for s in li.find(base, ["q_proj"])}
    li.inject(compiled, TARGETS, r=4, alpha=8)
    randomize(base)
    assert torch.allclose(run(compiled, X), expected, atol=1e-5)


def test_torch_export(base, expected):
    """torch.export accepts an adapted model, and the program computes the same."""
    program = torch.export.export(adapted(base), (), X)
    assert torch.allclose(program.module()(**X).logits, expected, atol=1e-5)


def test_deepcopy_is_independent(base, expected):
    """A deep copy has its own adapters and its own choice of active ones."""
    model = adapted(base)
    twin = copy.deepcopy(model)
    assert type(twin.model.layers[0].self_attn.q_proj) is type(model.model.layers[0].self_attn.q_proj)
    li.activate(model)
    randomize(model, seed=9)
    assert torch.equal(run(twin, X), expected)
    li.eject(twin)
    assert li.find(twin, TARGETS)


def test_a_pickled_model_works_in_a_fresh_process(base, expected, tmp_path):
    """A pickled model works in a process that has not made the grafted classes; a merged one can be unmerged there."""
    model = adapted(base)
    li.merge(model)
    torch.save({"model": model, "x": X, "expected": expected}, tmp_path / "m.pt")
    (tmp_path / "m.pickle").write_bytes(pickle.dumps(li.unmerge(model)))
    code = f"""
import pickle, torch
d = torch.load({str(tmp_path / "m.pt")!r}, weights_only=False)
import lorainject as li
merged = d["model"](**d["x"]).logits
li.unmerge(d["model"])
m = pickle.load(open({str(tmp_path / "m.pickle")!r}, "rb"))
for model in (d["model"], m):
    assert torch.equal(model(**d["x"]).logits, d["expected"])
    assert type(li.eject(model).model.layers[0].self_attn.q_proj) is torch.nn.Linear
assert torch.allclose(merged, d["expected"], atol=1e-5)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_gradient_checkpointing_gives_the_same_gradients(base):
    """Recomputed activations give the same gradients."""
    model = adapted(base).train()
    run(model, X).square().sum().backward()
    grads = [p.grad.clone() for p in li.parameters(model)]
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run(model, X).square().sum().backward()
    assert all(
        torch.allclose(g, p.grad, rtol=1e-5, atol=1e-6) for g, p in zip(grads, li.parameters(model), strict=True)
    )


@pytest.mark.filterwarnings("ignore:save_pretrained writes the weights of the base")  # each checkpoint has them
def test_trainer_trains_a_and_b_only_and_resumes(base, tmp_path):
    """transformers' Trainer trains A and B only, resumes from its checkpoint, and leaves no trace after eject."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in ids(rows=8)]
    before = state(base)
    li.inject(base, TARGETS, r=4)
    frozen = {k: bits(p) for k, p in base.named_parameters() if not p.requires_grad}
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
    }
    trainer = Trainer(base, TrainingArguments(**settings, max_steps=4, save_steps=2), train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert {k: bits(p) for k, p in base.named_parameters() if not p.requires_grad} == frozen
    expected = [bits(p) for p in li.parameters(base)]
    again = Trainer(base, TrainingArguments(**settings, max_steps=4), train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [bits(p) for p in li.parameters(base)] == expected
    li.eject(base.eval())
    after = state(base)
    del before[""], after[""]  # Trainer leaves an attribute on the model itself
    assert after == before


def test_users_hooks_see_the_adapted_layer(base):
    """The adapter gets the input from a pre-hook, a forward hook sees the adapted output, and a backward hook runs."""
    q = base.model.layers[0].self_attn.q_proj
    x, seen = torch.randn(3, 32), []
    q.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    q.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    q.register_full_backward_hook(lambda m, gin, gout: seen.append("backward"))
    adapted(base)
    y = q(x.requires_grad_())
    a, b, s = q.lora["default"].A, q.lora["default"].B, q.lora["default"].scale
    assert torch.allclose(y, 2 * x @ (q.weight + s * b @ a).T, atol=1e-5)
    assert torch.equal(seen[0], y)
    y.sum().backward()
    assert seen[-1] == "backward"
    li.eject(base)
    assert len(q._forward_pre_hooks) == len(q._forward_hooks) == len(q._backward_hooks) == 1


def test_autocast_keeps_the_dtype_of_the_base(base):
    """Under autocast the output has the dtype of the base's output, and float32 A and B get float32 gradients."""
    q = adapted(base).model.layers[0].self_attn.q_proj
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = q(torch.randn(3, 32))
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert q.lora["default"].A.grad.dtype is torch.float32


class Twice(nn.Module):
    """One linear at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_module_at_two_paths_has_one_adapter(tmp_path):
    """A module at two paths can be named by either. It has one adapter, which is applied twice and saved once."""
    model = Twice()
    before = state(model)
    (site,) = li.find(model, ["second"], r=2)
    assert (site.path, site.aliases) == ("first", ("second",))
    li.inject(model, ["second"], r=2)
    randomize(model)
    w = model.first.weight + (model.first.lora["default"].B @ model.first.lora["default"].A)
    x = torch.randn(3, 6)
    once = x @ w.T + model.first.bias
    assert torch.allclose(model(x), once @ w.T + model.first.bias, atol=1e-6)
    assert len(li.read(li.save(model, tmp_path / "a.safetensors")).sites) == 1
    li.merge(model)
    li.unmerge(model)
    assert state(li.eject(model)) == before


def test_an_adapter_on_a_tied_weight_leaves_the_other_user_alone():
    """An adapter on one user of a tied weight does not change the other one. A merge would, and is refused."""
    model = llama(tie_word_embeddings=True)
    before = state(model)
    li.inject(model, ["embed_tokens"], r=2)
    randomize(model)
    hidden = torch.randn(2, 32)
    assert torch.equal(model.lm_head(hidden), hidden @ model.lm_head.weight.T)
    middle = state(model)
    with pytest.raises(li.MergeError, match=r"model\.embed_tokens: its weight is tied to lm_head\.weight"):
        li.merge(model)
    assert state(model) == middle
    assert state(li.eject(model)) == before


def test_pristine_checkpoint_loads(base):
    """A checkpoint of the base loads into an adapted model with nothing missing, and does not change A and B."""
    checkpoint = copy.deepcopy(base.state_dict())
    model = adapted(base)
    assert checkpoint.keys() <= model.state_dict().keys()
    a_and_b = [bits(p) for p in li.parameters(model)]
    result = model.load_state_dict(checkpoint)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert [bits(p) for p in li.parameters(model)] == a_and_b
    for gone in ("model.layers.0.self_attn.q_proj.lora.default.B", "model.layers.1.self_attn.v_proj.lora."):
        partial = {k: v for k, v in model.state_dict().items() if not k.startswith(gone)}
        with pytest.raises(RuntimeError, match=rf"Missing key.*{gone}"):
            model.load_state_dict(partial)


def test_merged_state_dict_is_the_bases(base):
    """While merged, the state dict has only the keys of the base, so a saved model cannot apply A and B twice."""
    keys = list(base.state_dict())
    model = adapted(base)
    li.merge(model)
    assert list(model.state_dict()) == keys
    li.unmerge(model)
    assert len(model.state_dict()) > len(keys)


@pytest.mark.usefixtures("process_group")
def test_sharded_and_wrapped_models_are_refused(base, expected):
    """inject refuses a model after fully_shard or DDP; eject and merge refuse modules that were sharded since."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(li.TargetError, match=r"the model is already wrapped by DDP"):
        li.inject(DistributedDataParallel(copy.deepcopy(base)), ["q_proj"])
    sharded = fully_shard(copy.deepcopy(base), mesh=mesh)
    with pytest.raises(
        li.TargetError, match=r"wrapped by fully_shard.*\n(.*\n)*.*q_proj: its weight is already sharded"
    ):
        li.inject(sharded, ["q_proj"])

    model = adapted(copy.deepcopy(base))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(li.MergeError, match=r"layers\.\*\.self_attn\.q_proj: its weight is sharded"):
        li.merge(model)
    with pytest.raises(li.GraftError, match=r"q_proj: its A and B are sharded"):
        li.eject(model)

    model = adapted(base)
    q = model.model.layers[0].self_attn.q_proj
    fully_shard(q, mesh=mesh)
    assert torch.allclose(run(model, X), expected, atol=1e-5)
    before = state(model)
    with pytest.raises(li.GraftError, match=r"q_proj: .*FSDPLoraLinear was derived from the grafted class"):
        li.eject(model)
    assert state(model) == before


def test_a_parametrization_blocks_eject_until_it_is_removed(base):
    """A parametrization of a grafted module works; eject and merge name the module until it is removed."""
    from torch.nn.utils import parametrize

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    model = adapted(base)
    q = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    term = q(x) - x @ q.weight.T
    parametrize.register_parametrization(q, "weight", Double())
    assert torch.allclose(q(x), 2 * x @ q.parametrizations.weight.original.T + term, atol=1e-5)
    for verb, error in ((li.eject, li.GraftError), (li.merge, li.MergeError)):
        with pytest.raises(error, match=r"q_proj: .*ParametrizedLoraLinear was derived"):
            verb(model)
    with pytest.raises(li.TargetError, match=r"ParametrizedLoraLinear"):
        li.inject(model, ["q_proj"], name="other")
    parametrize.remove_parametrizations(q, "weight", leave_parametrized=False)
    li.eject(model)
    assert type(q) is nn.Linear


def test_script_modules_are_refused():
    """A ScriptModule has no class that could be changed."""
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(li.TargetError, match=r"1 is a RecursiveScriptModule, which cannot carry an adapter"):
        li.inject(model, ["1"])


def test_inject_on_the_meta_device():
    """On the meta device inject allocates nothing. After to_empty the scale is right, and A and B can be drawn."""
    with torch.device("meta"):
        model = llama()
    li.inject(model, ["q_proj"], r=4, alpha=8)
    assert all(p.is_meta for p in li.parameters(model))
    model.to_empty(device="cpu")
    adapter = model.model.layers[0].self_attn.q_proj.lora["default"]
    assert adapter.s.item() == 2
    li.reset(model)
    assert adapter.A.abs().sum() > 0
    assert adapter.B.abs().sum() == 0


def test_a_cast_keeps_the_scale(base):
    """model.to(bfloat16) rounds A and B, but not the scale."""
    model = li.inject(base, ["q_proj"], r=3, alpha=1).to(torch.bfloat16)
    s = model.model.layers[0].self_attn.q_proj.lora["default"].s
    assert s.dtype is torch.float32
    assert s.item() == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_sharded_experts_compute_the_same(implementation):
    """With fully_shard, experts use the gathered W0, A and B: outputs and gradients are those without sharding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = li.inject(moe_model(mixtral, implementation), ["experts", "q_proj"], r=4)
    randomize(model)
    plain, mesh = copy.deepcopy(model), init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    y, expected = moe_output(model), moe_output(plain)
    assert torch.allclose(y, expected, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(li.parameters(model), li.parameters(plain), strict=True):
        assert torch.allclose(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["dt_proj", "conv1d", "out_proj"])
def test_offloaded_weights_that_a_parent_reads_are_adapted(target):
    """accelerate loads Mamba's weights while they are shadowed: the adapter acts. probe refuses offloaded weights."""
    from accelerate import cpu_offload
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    model = MambaModel(MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    li.inject(model, [target], r=2)
    randomize(model)
    expected = model(ids()).last_hidden_state
    cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        assert torch.allclose(model(ids()).last_hidden_state, expected, atol=1e-5)
    with pytest.raises(li.StateError, match=r"is on the meta device \(offloaded\)"):
        li.probe(model, ids())
