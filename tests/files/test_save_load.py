"""What save writes, what load accepts, and what load refuses without changing the model."""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorainject as li
from lorainject.files.formats import native
from lorainject.files.io import safetensors_file

from models import bert, bits, gpt2, ids, llama, randomize, run, state

X = {"input_ids": ids()}
TARGETS = ["q_proj", "v_proj", "embed_tokens"]


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return llama()


@pytest.fixture
def model(base) -> nn.Module:
    model = li.inject(
        copy.deepcopy(base), TARGETS, r=4, alpha=8, dropout=0.1, overrides={"layers.1.*": {"r": 2, "alpha": 6}}
    )
    randomize(model)
    return model


@pytest.mark.parametrize("place", ["adapter", "adapter.safetensors"])
def test_a_saved_adapter_loads_exactly(base, model, tmp_path, place):
    """On a fresh base, the output and the settings are the same, and saving again gives the same bytes."""
    path = li.save(model, tmp_path / place)
    assert path == tmp_path / place
    li.load(base, path)
    assert torch.equal(run(base, X), run(model, X))
    assert base.model.layers[1].self_attn.q_proj.lora["default"].dropout == 0.1
    again = li.save(base, tmp_path / f"again-{place}")
    for name in ("adapter_model.safetensors", "adapter_config.json") if place == "adapter" else ("",):
        assert (again / name if name else again).read_bytes() == (path / name if name else path).read_bytes()


def test_a_file_holds_only_a_and_b(model, tmp_path):
    """No weight of the base is in the file, not even an adapted embedding's; its size is A, B and a header."""
    path = li.save(model, tmp_path / "a.safetensors")
    tensors = load_file(path)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in li.parameters(model))
    assert all(
        key.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")) for key in tensors
    )
    assert path.stat().st_size < sum(t.nbytes for t in tensors.values()) + 4096


def test_any_process_writes_the_same_bytes(tmp_path):
    """Two processes with different hash seeds write the same files."""
    code = """
import sys, torch, lorainject as li
torch.manual_seed(0)
model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 6) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
li.inject(model, ["q_proj", "v_proj", "o_proj"], r=4, overrides={"o_proj": {"r": 2}})
li.save(model, sys.argv[1])
"""
    folders = [tmp_path / seed for seed in "12"]
    for folder in folders:
        environment = os.environ | {"PYTHONHASHSEED": folder.name}
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, folder], check=True, env=environment)
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert first == second
    assert len(first) == 2


def test_file_modes_follow_the_umask(model, tmp_path):
    """Files are as readable as the user's umask says, not 0600."""
    old = os.umask(0o027)
    try:
        path = li.save(model, tmp_path / "a")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(f.stat().st_mode) for f in path.iterdir()} == {0o640}
    assert sorted(f.name for f in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_read_needs_no_model(model, tmp_path):
    """li.read gives every site with A (r, in), B (out, r) and its scale."""
    file = li.read(li.save(model, tmp_path / "a"))
    sites = {s.path: s for s in file.sites}
    assert file.format == "lorainject"
    assert file.parameters == sum(p.numel() for p in li.parameters(model))
    assert sites["model.embed_tokens"].embedding
    assert sites["model.layers.0.self_attn.q_proj"].scale == 2
    assert (sites["model.layers.1.self_attn.q_proj"].r, sites["model.layers.1.self_attn.q_proj"].scale) == (2, 3)
    assert file.config["target_modules"] == ["embed_tokens", "q_proj", "v_proj"]


def test_one_of_several_adapters_is_saved(base, model, tmp_path):
    """The file holds all tensors of this adapter and none of another, whatever their names."""
    li.inject(model, ["up_proj"], r=2, name="mlp")
    file = li.read(li.save(model, tmp_path / "a"))
    assert len(file.sites) == 5
    li.load(base, tmp_path / "a", name="renamed")
    assert list(base.model.embed_tokens.lora) == ["renamed"]
    with pytest.raises(li.StateError, match=r"no adapter named 'default'\n=> this model has 'renamed'"):
        li.save(base, tmp_path / "b")


def test_a_merged_adapter_is_saved_alike(model, tmp_path):
    """A merge changes no byte of the file, the fingerprint of the base included."""
    before = li.save(model, tmp_path / "a.safetensors").read_bytes()
    li.merge(model)
    assert li.save(model, tmp_path / "b.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_another_dtype_is_the_same_base(model, base, dtype, tmp_path):
    """A base rounded to half precision is accepted; A and B keep the file's dtype or get the one asked for."""
    path = li.save(model, tmp_path / "a.safetensors")
    half = base.to(dtype)
    li.load(half, path)
    assert {p.dtype for p in li.parameters(half)} == {torch.float32}
    li.eject(half)
    li.load(half, path, dtype=dtype)
    assert {p.dtype for p in li.parameters(half)} == {dtype}


def test_another_base_is_refused(model, tmp_path):
    """Another model of the same shapes is refused, unless check_base=False."""
    path = li.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(1)
    other = llama()
    before = state(other)
    with pytest.raises(
        li.FileError,
        match=r"made for another base model; nothing was loaded:(.*\n)*.*q_proj: differs from the base weight(.*\n)*"
        r"=> load it onto the base that it was trained on, or accept this one with check_base=False",
    ):
        li.load(other, path)
    assert state(other) == before
    li.load(other, path, check_base=False)


def test_all_that_does_not_fit_a_model_is_listed(model, tmp_path):
    """One error lists every site that does not fit, with both shapes."""
    path = li.save(model, tmp_path / "a.safetensors")
    wide = llama(hidden_size=64, num_hidden_layers=1)
    before = state(wide)
    with pytest.raises(li.FileError) as e:
        li.load(wide, path)
    assert (
        "model.layers.0.self_attn.q_proj: the file has A (4, 32) and B (32, 4),"
        " but this model's weight needs A (4, 64) and B (64, 4)" in e.value.problems
    )
    assert "model.layers.1.self_attn.q_proj: is not in this model" in e.value.problems
    assert len(e.value.problems) == 5
    assert state(wide) == before
    with pytest.raises(li.FileError, match="is not in this model"):
        li.load(bert(), path)


def test_a_name_can_be_loaded_once(base, model, tmp_path):
    """A second adapter needs another name; it is then the active one."""
    path = li.save(model, tmp_path / "a")
    li.load(base, path)
    with pytest.raises(
        li.StateError, match=r"already carries an adapter named 'default': eject it, or pass another name="
    ):
        li.load(base, path)
    li.load(base, path, name="again")
    assert base.model.embed_tokens.lora.state.choice.active == ("again",)


def spoil(path, change):
    """Replace the bytes of a file by what `change` makes of them."""
    data = bytearray(path.read_bytes())
    changed = change(data)
    path.write_bytes(data if changed is None else changed)


def flip(position):
    def change(data):
        data[position if position >= 0 else len(data) + position] ^= 4

    return change


DAMAGE = {
    "truncated": (lambda d: d[: len(d) // 2], r"is not a whole safetensors file"),
    "cut by a byte": (lambda d: d[:-1], r"is not a whole safetensors file"),
    "empty": (lambda d: bytearray(b""), r"is empty"),
    "only zeros": (lambda d: bytearray(len(d)), r"is not a whole safetensors file"),
    "a pickle": (lambda d: bytearray(b"\x80\x02}q\x00."), r"it looks like a pickle"),
    "a zip": (lambda d: bytearray(b"PK\x03\x04" + bytes(100)), r"it looks like a zip, perhaps a torch pickle"),
    "a web page": (lambda d: bytearray(b"<!DOCTYPE html>" + bytes(100)), r"it looks like a web page"),
    "an lfs pointer": (lambda d: bytearray(b"version https://git-lfs.github.com/spec/v1\n"), r"git-lfs pointer"),
    "a header of 2 GB": (lambda d: bytearray(struct.pack("<Q", 2**31)) + d[8:], r"is not a whole safetensors file"),
    "a bit of a tensor": (flip(-5), r"its digest does not match: bits were changed"),
    "a bit of the header": (
        flip(400),
        r"digest does not match|not a whole safetensors file|record is damaged|holds no record|missing",
    ),
}


@pytest.mark.parametrize(("change", "message"), [pytest.param(*w, id=name) for name, w in DAMAGE.items()])
def test_damaged_files_are_refused(base, model, tmp_path, change, message):
    """Truncated, empty, foreign and bit-flipped files are errors with a next step; the model is unchanged."""
    path = li.save(model, tmp_path / "a.safetensors")
    spoil(path, change)
    before = state(base)
    with pytest.raises(li.FileError, match=message) as e:
        li.load(base, path)
    assert "\n=> " in str(e.value)
    assert state(base) == before


def test_loaded_tensors_share_no_memory(base, model, tmp_path):
    """Each tensor can be written to, keeps no other alive, and does not depend on the file."""
    path = li.save(model, tmp_path / "a.safetensors")
    first, second = li.read(path), li.read(path)
    li.load(base, path)
    path.write_bytes(b"another")
    loaded = [p.detach() for p in li.parameters(base)]
    tensors = [t for file in (first, second) for s in file.sites for t in (s.A, s.B)] + loaded
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    first.sites[0].A.add_(1)
    assert torch.equal(first.sites[0].A, second.sites[0].A + 1)
    assert [bits(t) for t in loaded] == [bits(p) for p in li.parameters(model)]


def test_a_flipped_bit_never_loads_as_something_else(model, tmp_path):
    """A bit flipped anywhere in the file is an error, or in padding."""
    path = li.save(model, tmp_path / "a.safetensors")
    data = path.read_bytes()
    good = [(s.path, s.scale, bits(s.A), bits(s.B)) for s in li.read(path).sites]
    for position in range(0, len(data), 13):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            file = li.read(path)
        except li.FileError:
            continue
        assert [(s.path, s.scale, bits(s.A), bits(s.B)) for s in file.sites] == good  # padding, or {"format": ...}


def rewritten(model, folder, change):
    """Write a directory as PEFT would, with changed tensors and config."""
    path = li.save(model, folder)
    tensors, config = (
        load_file(path / "adapter_model.safetensors"),
        json.loads((path / "adapter_config.json").read_text()),
    )
    change(tensors, config)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
PEFT_LIKE = {
    "missing B": (lambda t, c: t.pop(Q + "B.weight"), r"q_proj\.lora_B\.weight: missing"),
    "missing site": (
        lambda t, c: [t.pop(Q + "A.weight"), t.pop(Q + "B.weight")],
        r"layers\.0\.self_attn\.q_proj: missing in the file, though its config targets it",
    ),
    "unexpected": (lambda t, c: t.update({"x.y": torch.ones(1)}), r"x\.y: unexpected, neither A nor B"),
    "NaN": (lambda t, c: t[Q + "A.weight"].fill_(float("nan")), r"q_proj\.lora_A\.weight: holds NaN or infinity"),
    "integers": (
        lambda t, c: t.update({Q + "A.weight": torch.ones(4, 32, dtype=torch.int32)}),
        r"torch\.int32 is not a floating-point type",
    ),
    "zero elements": (
        lambda t, c: t.update({Q + "A.weight": torch.ones(0), Q + "B.weight": torch.ones(0)}),
        r"no pair|is empty",
    ),
    "ranks that differ": (
        lambda t, c: t.update({Q + "A.weight": torch.ones(3, 32)}),
        r"A \(3, 32\) with B \(32, 4\) is no pair",
    ),
    "IA3": (lambda t, c: c.update(peft_type="IA3"), r"peft_type is 'IA3': only LORA"),
    "DoRA": (lambda t, c: c.update(use_dora=True), r"use_dora is set, which is not plain LoRA"),
    "modules_to_save": (lambda t, c: c.update(modules_to_save=["lm_head"]), r"modules_to_save is set"),
    "pissa": (lambda t, c: c.update(init_lora_weights="pissa_niter_4"), r"belongs to an altered base"),
    "an evil pattern": (
        lambda t, c: c.update(alpha_pattern={"(.|.|..)+p": 2}),
        r"cannot be used: it takes more than 1 s",
    ),
    "a broken pattern": (lambda t, c: c.update(alpha_pattern={"(": 2}), r"pattern .* cannot be used"),
    "another base embedding": (
        lambda t, c: t.update({"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(99, 32)}),
        r"whole base weight that is not this model's",
    ),
}


@pytest.mark.parametrize(("change", "message"), [pytest.param(*w, id=name) for name, w in PEFT_LIKE.items()])
def test_faulty_peft_files_are_refused(base, model, tmp_path, change, message):
    """The error names what is wrong, where PEFT would load the file silently; the model is unchanged."""
    path = rewritten(model, tmp_path / "a", change)
    before = state(base)
    with pytest.raises(li.FileError, match=message):
        li.load(base, path)
    assert state(base) == before


def test_all_faults_of_a_file_are_listed(base, model, tmp_path):
    """Several faults in one file are one error."""

    def change(t, c):
        t[Q + "A.weight"].fill_(float("inf"))
        t["x.y"] = torch.ones(1)
        t.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight")
        c["use_dora"] = True

    with pytest.raises(li.FileError) as e:
        li.load(base, rewritten(model, tmp_path / "a", change))
    assert len(e.value.problems) == 4


def test_a_damaged_config_next_to_our_file_is_refused(base, model, tmp_path):
    """A config of the wrong types next to a file with our record is a FileError."""
    path = li.save(model, tmp_path / "a")
    config = path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": "much"'))
    with pytest.raises(li.FileError, match="is not a config as PEFT writes it"):
        li.load(base, path)


def test_an_edited_config_is_refused(base, model, tmp_path):
    """The header and adapter_config.json must give the same scale."""
    path = li.save(model, tmp_path / "a")
    config = path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    with pytest.raises(li.FileError, match=r"q_proj: adapter_config\.json says scale 4, the tensor file 2"):
        li.load(base, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing", r"cannot be read: No such file"),
        (lambda p: p, r"holds no adapter_model\.safetensors(.*\n)*.*it holds nothing"),
        (
            lambda p: (
                save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, p / "b.safetensors")
                or p / "b.safetensors"
            ),
            r"no record of alpha",
        ),
    ],
)
def test_paths_without_an_adapter_are_refused(base, tmp_path, make, message):
    """A missing path, an empty folder and a bare tensor file are errors."""
    with pytest.raises(li.FileError, match=message):
        li.load(base, make(tmp_path))


def test_paths_that_cannot_be_written_are_refused(model, tmp_path):
    """A file in the way, or a folder that is a device, is one error, and nothing is left behind."""
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below", "file/below.safetensors"):
        with pytest.raises(li.FileError, match="=> "):
            li.save(model, tmp_path / place)
    with pytest.raises(li.FileError, match=r"cannot be written"):
        li.save(model, "/proc/nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_the_old_file(model, tmp_path):
    """When the space ends in the middle of a save, the old file is whole and no temporary file is left."""
    path = li.save(model, tmp_path / "a.safetensors")
    old = path.read_bytes()
    randomize(model, seed=3)
    torch.save(model, tmp_path / "m.pt")
    code = f"""
import resource, signal, torch, lorainject as li
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.load({str(tmp_path / "m.pt")!r}, weights_only=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    li.save(model, {str(path)!r})
except li.FileError as e:
    assert "cannot be written: File too large" in str(e) and "unchanged" in str(e), e
else:
    raise SystemExit("saved?")
"""
    assert hasattr(signal, "SIGXFSZ")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert path.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "m.pt"]


def test_a_reader_during_a_save_sees_one_whole_file(model, tmp_path):
    """A save renames the new file over the old one, which an open reader reads to its end."""
    path = li.save(model, tmp_path / "a.safetensors")
    old = path.read_bytes()
    with open(path, "rb") as reader:
        randomize(model, seed=3)
        li.save(model, path)
        assert reader.read() == old
    assert path.read_bytes() != old


def test_tensors_are_sorted_and_aligned(model, tmp_path):
    """The safetensors package reads our files, whose tensors are sorted by name and aligned to 8 bytes."""
    path = li.save(model, tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as f:
        keys = list(f.keys())
        record = json.loads(f.metadata()["lorainject"])
    assert len(keys) == 10
    assert record["sites"]["model.layers.1.self_attn.v_proj"] == {
        "alpha": 6.0,
        "scaling": "standard",
        "dropout": 0.1,
        "aliases": [],
    }
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def test_conv1d_is_saved_as_a_linear(tmp_path):
    """GPT-2's factors have a linear's layout, and fan_in_fan_out tells PEFT how the weight is stored."""
    torch.manual_seed(0)
    model = gpt2()
    fresh = copy.deepcopy(model)
    li.inject(model, ["c_attn"], r=4)
    randomize(model)
    path = li.save(model, tmp_path / "a")
    assert json.loads((path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert torch.equal(run(li.load(fresh, path), X), run(model, X))


class Pair(nn.Module):
    """Two linears, or one at two paths."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.b = self.a if shared else nn.Linear(4, 4)
        self.b.load_state_dict(self.a.state_dict())


def test_shared_modules_must_be_shared_again(tmp_path):
    """An adapter of one shared module does not fit two modules, nor the reverse: half of it would be lost silently."""
    for shared, message in (
        (True, "a: was one module with b when the adapter was saved"),
        (False, "b: is the same module as a in this model"),
    ):
        model = li.inject(Pair(shared), ["a", "b"], r=2)
        randomize(model)
        path = li.save(model, tmp_path / f"{shared}.safetensors")
        with pytest.raises(li.FileError, match=message):
            li.load(Pair(not shared), path)
        li.load(Pair(shared), path)


def test_other_trained_parameters_are_named(base, model, tmp_path):
    """A head that trains is not in the file, and a warning of save says so."""
    model.lm_head.weight.requires_grad_()
    with pytest.warns(UserWarning, match=r"lm_head\.weight train too, but belong to no adapter"):
        path = li.save(model, tmp_path / "a")
    file = li.read(path)
    assert not file.replaced
    assert not any("lm_head" in site.name for site in file.sites)


@pytest.mark.filterwarnings("ignore:Detected CUDA")
def test_wrappers_change_no_name(base, model, tmp_path):
    """A model wrapped by DataParallel or torch.compile saves the same file."""
    plain = li.save(model, tmp_path / "a.safetensors").read_bytes()
    for wrapper in (nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))):
        assert li.save(wrapper, tmp_path / "b.safetensors").read_bytes() == plain


def test_a_model_can_be_one_layer(tmp_path):
    """A layer alone, whose path is empty, is saved and loaded."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    fresh = copy.deepcopy(layer)
    li.inject(layer, lambda path, m: True, r=2)
    randomize(layer)
    x = torch.randn(2, 4)
    for place in ("a", "a.safetensors"):
        li.load(fresh, li.save(layer, tmp_path / place))
        assert torch.equal(fresh(x), layer(x))
        li.eject(fresh)


def test_a_file_can_change_after_it_was_read(model, tmp_path):
    """A and B have memory of their own, so a file that is rewritten later does not change them."""
    path = li.save(model, tmp_path / "a.safetensors")
    sites = li.read(path).sites
    before = [bits(s.A) + bits(s.B) for s in sites]
    with open(path, "r+b") as f:
        f.seek(-2000, os.SEEK_END)
        f.write(bytes(2000))
    assert [bits(s.A) + bits(s.B) for s in sites] == before


def test_a_missing_alpha_is_pefts_default(base, model, tmp_path):
    """PEFT takes lora_alpha = 8 if a config does not say it, whatever r is."""
    path = rewritten(model, tmp_path / "a", lambda t, c: [c.pop("lora_alpha"), c.pop("alpha_pattern")])
    assert {s.alpha for s in li.read(path).sites} == {8.0}


def test_mixed_and_narrow_dtypes(base, model, tmp_path):
    """A and B of two dtypes load as the wider one; a dtype that cannot hold them is refused."""

    def change(t, c):
        t[Q + "A.weight"] = t[Q + "A.weight"].half()
        t[Q + "B.weight"] *= 1e6

    path = rewritten(model, tmp_path / "a", change)
    with pytest.raises(
        li.FileError, match=r"layers\.0\.self_attn\.q_proj: its A or B exceeds the range of torch\.float16"
    ):
        li.load(base, path, dtype=torch.float16)
    li.load(base, path)
    assert base.model.layers[0].self_attn.q_proj.lora["default"].A.dtype is torch.float32


def test_the_error_points_to_a_named_peft_folder(model, tmp_path):
    """PEFT saves an adapter that is not called "default" one folder further down; the error says where."""
    li.save(model, tmp_path / "a" / "fr")
    with pytest.raises(li.FileError, match=rf"=> give {tmp_path}/a/fr"):
        li.read(tmp_path / "a")


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": 5},
        {"alpha_pattern": [1]},
        {"lora_alpha": "8"},
        {"lora_dropout": 7},
        {"lora_alpha": float("nan")},
    ],
)
def test_configs_of_wrong_types_are_refused(base, model, tmp_path, config):
    """A config of the wrong types is a FileError, never an error of Python's own."""
    path = rewritten(model, tmp_path / "a", lambda t, c: c.update(config))
    with pytest.raises(li.FileError):
        li.load(base, path)


FORGED = {
    "rows out of range": (lambda site: site | {"rows": [[100, 103, 1]]}, r"rows that are not all within 0:9"),
    "negative rows": (lambda site: site | {"rows": [[-3, 0, 1]]}, r"rows that are not all within 0:9"),
    "a row twice": (lambda site: site | {"rows": [[0, 1, 1]] * 3}, r"names a row twice"),
    "more rows than memory": (lambda site: site | {"rows": [[0, 10**30, 1]]}, r"is damaged|not all within"),
    "another kind": (
        lambda site: site | {"kind": "linear^T", "shape": [4, 9]},
        r"was saved for a weight of kind linear\^T, but this model has a weight of kind linear",
    ),
    "another shape": (
        lambda site: site | {"shape": [12, 4]},
        r"was saved for a weight of shape \(12, 4\), but this model's weight has shape \(9, 4\)",
    ),
    "a shape that A and B are not for": (
        lambda site: site | {"shape": [9, 9]},
        r"does not fit a weight of shape \(9, 9\) and kind linear",
    ),
    "a path that is no text": (lambda site: site | {"path": 3}, r"is damaged: ValueError: .*: 3 is no name"),
    "a scaling that is none": (
        lambda site: site | {"scaling": "foo"},
        r"is damaged: ValueError: 0\[0:3\]: scaling is 'foo', not one of standard, rslora",
    ),
}


@pytest.mark.parametrize(("change", "message"), [pytest.param(*w, id=name) for name, w in FORGED.items()])
def test_forged_records_are_refused(change, message, tmp_path):
    """A record whose digest is right and whose slice is not is refused by name, and nothing is loaded."""
    from lorainject.files.io import atomic_write

    model = li.inject(nn.Sequential(nn.Linear(4, 9)), ["0[0:3]"], r=2)
    path = li.save(model, tmp_path / "a.safetensors")
    tensors, metadata = safetensors_file.read(path)
    body = json.loads(metadata[native.KEY])
    del body["digest"]
    body["sites"] = {name: change(site) for name, site in body["sites"].items()}
    record = json.dumps(body | {"digest": native.digest(body, tensors)})
    atomic_write.write({path: safetensors_file.dump(tensors, {"format": "pt", native.KEY: record})})
    fresh = nn.Sequential(nn.Linear(4, 9))
    before = state(fresh)
    with pytest.raises(li.FileError, match=message):
        li.load(fresh, path, check_base=False)
    assert state(fresh) == before


def test_a_tensor_that_the_record_does_not_know_is_refused(tmp_path):
    """The error names the tensor."""
    from lorainject.files.io import atomic_write

    path = li.save(li.inject(nn.Sequential(nn.Linear(4, 9)), ["0"], r=2), tmp_path / "a.safetensors")
    tensors, metadata = safetensors_file.read(path)
    tensors["stray"] = torch.zeros(2)
    body = json.loads(metadata[native.KEY])
    del body["digest"]
    record = json.dumps(body | {"digest": native.digest(body, tensors)})
    atomic_write.write({path: safetensors_file.dump(tensors, {"format": "pt", native.KEY: record})})
    with pytest.raises(li.FileError, match="stray: unexpected, neither A nor B of a site"):
        li.read(path)


def test_a_slice_of_another_layout_is_refused(tmp_path):
    """The slice q of two heads has other rows than that of four, although every shape fits."""
    from transformers import GPTNeoXConfig, GPTNeoXModel

    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    two, four = (GPTNeoXModel(GPTNeoXConfig(**sizes, num_attention_heads=heads)) for heads in (2, 4))
    path = li.save(li.inject(two, ["query_key_value[q]"], r=2), tmp_path / "a.safetensors")
    with pytest.raises(
        li.FileError, match=r"its part 'q' has other rows in this model: the numbers of attention heads may differ"
    ):
        li.load(four, path, check_base=False)


def test_the_order_of_injection_changes_no_byte(tmp_path):
    """The order in which parameters and slices of a module got adapters changes neither bytes nor PEFT's nested
    names."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.full((2, 4, 4), 1.0)), nn.Parameter(torch.full((2, 4, 4), 2.0))

        def forward(self, x):
            return x @ self.up[0] @ self.down[1]

    written = []
    for first in ([], ["down"], ["fused[2:4]"]):
        model = nn.Sequential()
        model.experts, model.fused = Experts(), nn.Linear(4, 4)
        nn.init.zeros_(model.fused.weight)
        if first:
            li.inject(model, first, r=2, name="first")
        li.inject(model, ["up", "down", "fused[0:2,2:4]"], r=2)
        randomize(model)
        with torch.no_grad():
            for path, p in model.named_parameters():
                if ".default." in path:
                    p.fill_(len(path))
        written.append(li.save(model, tmp_path / "a.safetensors").read_bytes())
        li.eject(model)
        li.load(model, tmp_path / "a.safetensors")  # the base's fingerprint goes by the same order
    assert written[0] == written[1] == written[2]
    up = next(s for s in li.read(tmp_path / "a.safetensors").sites if s.parameter == "up")
    assert float(up.A[0, 0, 0]) == len("experts.lora_up.default.A")
