"""Files made by strangers: each is refused for a stated reason, takes bounded time and memory, and runs no code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

import lorainject as li

from oracle import FIXTURES, is_same_record

PAIR = {"base_model.model.a.lora_A.weight": torch.ones(2, 3), "base_model.model.a.lora_B.weight": torch.ones(4, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a"]}


def peft(folder: Path, tensors=PAIR, **config: object) -> Path:
    """Write a directory as PEFT does."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


class Bomb:
    """An object that makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("allow", [False, True])
def test_a_pickle_runs_nothing(allow, legacy, tmp_path):
    """With or without allow_pickle, in torch's zip or in the old format, no code of the pickle runs."""
    torch.save(
        {"a.lora_A": torch.ones(2, 3), "a.lora_B": Bomb(tmp_path / "ran")},
        tmp_path / "x.bin",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(
        li.FileError,
        match="is not a pickle that holds only tensors"
        if allow
        else r"could run code when it is opened(.*\n)*=> .*allow_pickle=True",
    ):
        li.read(tmp_path / "x.bin", allow_pickle=allow, hints=li.Hints(alpha=1))
    assert not (tmp_path / "ran").exists()


def test_pickles_are_opened_only_if_allowed(tmp_path):
    """The content decides what a pickle is, whatever the name, and the caller must allow it."""
    torch.save({"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(4, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(li.FileError, match="allow_pickle=True"):
        li.read(tmp_path / "x.safetensors", hints=li.Hints(alpha=1))
    assert li.read(tmp_path / "x.safetensors", allow_pickle=True, hints=li.Hints(alpha=1)).format == "loralib"
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    with pytest.raises(li.FileError):
        li.read(tmp_path / "plain.pkl", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    """One element seen as 10^12 has a stride of zero and takes no room on disk; it is refused before it is read."""
    huge = torch.ones(1).expand(10**6, 10**6)
    torch.save({"a.lora_A": huge, "a.lora_B": torch.ones(4, 2)}, tmp_path / "x.bin")
    with pytest.raises(li.FileError, match=r"a\.lora_A: its elements are not all in the file"):
        li.read(tmp_path / "x.bin", allow_pickle=True, hints=li.Hints(alpha=1))


def test_a_npz_of_objects_is_refused(tmp_path):
    """numpy's pickles are not opened."""
    numpy.savez(tmp_path / "x.npz", **{"a.lora_a": numpy.array([Bomb(tmp_path / "ran")], dtype=object)})
    with pytest.raises(li.FileError, match="is not a whole npz file of numbers"):
        li.read(tmp_path / "x.npz", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_a_zip_bomb_is_refused(tmp_path, monkeypatch):
    """The size to which an archive says that it unpacks is checked first."""
    monkeypatch.setattr("lorainject.files.io.containers.MIN_UNPACKED", 2**16)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.lora_a.npy", bytes(2**24))
    with pytest.raises(li.FileError, match=r"would unpack to 16,777,216 bytes"):
        li.read(tmp_path / "x.npz")


def archive(path: Path, *members: tuple[str, bytes], link: str = "") -> Path:
    """Write a tar of these members, with a symbolic link to `link` if it is given."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)
    return path


WHOLE = (("x/adapter_model.safetensors", save(PAIR)), ("x/adapter_config.json", json.dumps(CONFIG).encode()))


def test_a_tinker_archive_is_read(tmp_path):
    """Its two files are read from the archive, and nothing is unpacked."""
    assert is_same_record(li.read(archive(tmp_path / "a.tar.gz", *WHOLE)), li.read(peft(tmp_path / "b")))


@pytest.mark.parametrize(
    ("members", "link", "message"),
    [
        ((*WHOLE, ("../../evil", b"x")), "", r"'\.\./\.\./evil' leads out of it"),
        ((*WHOLE, ("/etc/evil", b"x")), "", r"'/etc/evil' leads out of it"),
        (WHOLE, "/etc/passwd", r"'link' leads out of it, or is a link or device"),
        (WHOLE[:1], "", r"an archive without"),
        ((("model_config.yaml", b""), ("model_weights.ckpt", b"")), "", r"is an archive of NeMo(.*\n)*=> export it"),
    ],
)
def test_unsafe_archives_are_refused(members, link, message, tmp_path):
    """A member that leads out of the archive spoils all of it, whatever else it holds."""
    with pytest.raises(li.FileError, match=message):
        li.read(archive(tmp_path / "a.nemo", *members, link=link))


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_patterns_that_never_end(field, tmp_path):
    """A pattern from a file that would run for hours is stopped by its time limit, and the error says so."""
    path = "base_model.model." + "a" * 40
    tensors = {f"{path}!.lora_A.weight": torch.ones(2, 3), f"{path}!.lora_B.weight": torch.ones(4, 2)}
    extra = {"target_parameters": ["a" * 40 + "!.p"]} if field == "rank_pattern" else {}
    with pytest.raises(li.FileError, match="cannot be used: it takes more than 1 s"):
        li.read(peft(tmp_path / "a", tensors, **{field: {"(a|aa)+$": 4}}, **extra))


def safetensors(header: str | bytes, data: bytes = bytes(8)) -> bytes:
    """Return a safetensors file with this header, whatever it says, and these bytes of tensors."""
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


ONE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
BAD_HEADERS = {
    "longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "longer than 100 MB": safetensors(ONE + " " * 10**8),
    "offsets beyond the end": safetensors(ONE.replace("[2]", "[1000000,1000000]").replace("8]", "4000000000000]")),
    "tensors that overlap": safetensors(ONE[:-1] + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'),
    "a gap before a tensor": safetensors(ONE.replace("[2]", "[1]").replace("[0,", "[4,")),
    "bytes behind the tensors": safetensors(ONE, bytes(9)),
    "a byte short": safetensors(ONE, bytes(7)),
    "an empty tensor within another": safetensors(ONE[:-1] + ',"b":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}'),
    "no JSON": safetensors("{[}]"),
    "a list": safetensors("[]", b""),
    "text behind it": safetensors(ONE + "x"),
    "NaN": safetensors(ONE.replace("}}", ',"z":NaN}}')),
    "a field twice": safetensors(ONE.replace("}}", ',"dtype":"F32"}}')),
    "metadata twice": safetensors('{"__metadata__":{},"__metadata__":{},' + ONE[1:]),
    "metadata that are no text": safetensors('{"__metadata__":{"x":1},' + ONE[1:]),
    "no dtype": safetensors(ONE.replace('"dtype":"F32",', "")),
    "an entry that is null": safetensors('{"a":null}'),
    "fractions": safetensors(ONE.replace("[2]", "[2.0]")),
    "booleans": safetensors(ONE.replace("[2]", "[2,true]")),
    "digits in quotes": safetensors(ONE.replace("[2]", '"2"')),
    "a negative size": safetensors(ONE.replace("[2]", "[-2]")),
    "three offsets": safetensors(ONE.replace("8]", "8,9]")),
    "offsets that go back": safetensors(ONE[:-1] + ',"b":{"dtype":"F32","shape":[0],"data_offsets":[8,4]}}'),
    "sizes of 2^64 and 0": safetensors(ONE.replace("[2]", "[4294967296,4294967296,0]").replace("8]", "0]"), b""),
    "a size of 10^20": safetensors(ONE.replace("[2]", "[0,100000000000000000000]").replace("8]", "0]"), b""),
    "another size than its dtype's": safetensors(ONE.replace("[2]", "[3]")),
    "a fraction of a byte": safetensors(ONE.replace("F32", "F6_E2M3").replace("[2]", "[11]")),
    "half a surrogate pair": safetensors(ONE.replace('"a"', r'"a\ud800"')),
    "not UTF-8": safetensors(ONE.encode().replace(b'"a"', b'"a\xff"')),
    "100,000 brackets": safetensors("{" + '"a":[' * 10**5),
}


@pytest.mark.parametrize("data", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_malformed_safetensors_headers_are_refused(data, tmp_path):
    """Lengths, sizes and offsets are a stranger's claims; the safetensors package refuses these files too."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass
    with pytest.raises(li.FileError, match=r"is not a whole safetensors file: .*(\n.*)*=> the file is damaged"):
        li.read(path)


def test_a_tensor_name_that_occurs_twice_is_refused(tmp_path):
    """The format forbids it; readers differ in which of the two they take."""
    (tmp_path / "x.safetensors").write_bytes(safetensors(ONE[:-1] + "," + ONE[1:]))
    with pytest.raises(li.FileError, match="not a whole safetensors file: a name occurs twice in its header"):
        li.read(tmp_path / "x.safetensors")


def test_tensors_of_unsupported_types_are_listed(tmp_path):
    """A well-formed file can hold data types that no adapter has; the error names each tensor."""
    (tmp_path / "x.safetensors").write_bytes(safetensors(ONE.replace("F32", "F4").replace("[2]", "[16]")))
    with pytest.raises(li.FileError, match=r"unsupported data types:\n  - a: F4\n=> save the adapter in float32"):
        li.read(tmp_path / "x.safetensors")


def gguf(*parts: bytes, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)


def text(s: bytes) -> bytes:
    return struct.pack("<Q", len(s)) + s


GGUFS = {
    "2^60 keys": gguf(keys=2**60),
    "2^60 tensors": gguf(tensors=2**60),
    "a string of 2^50": gguf(text(b"k"), struct.pack("<IQ", 8, 2**50), keys=1),
    "an array of 2^60 strings": gguf(text(b"k"), struct.pack("<IIQ", 9, 8, 2**60), keys=1),
    "an array of 2^60": gguf(text(b"k"), struct.pack("<IIQ", 9, 4, 2**60), keys=1),
    "arrays in arrays": gguf(text(b"k"), struct.pack("<I", 9), *[struct.pack("<IQ", 9, 1)] * 100, keys=1),
    "a type that is none": gguf(text(b"k"), struct.pack("<I", 99), keys=1),
    "a tensor of 2^60": gguf(text(b"t"), struct.pack("<IQQIQ", 2, 2**30, 2**30, 0, 0), tensors=1),
    "nothing": b"GGUF",
}


@pytest.mark.parametrize("data", GGUFS.values(), ids=GGUFS)
def test_gguf_headers(data, tmp_path, monkeypatch):
    """The counts in a header are checked against the file's size; the gguf package, which would loop over them, never
    runs."""
    monkeypatch.setattr("gguf.GGUFReader", lambda path: pytest.fail("the gguf package was given the file"))
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(li.FileError, match="is not a whole GGUF file"):
        li.read(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "fixture",
    ["gguf/lora.gguf", "onnx_adapter/a.onnx_adapter", "kohya_lycoris/lora.safetensors", "litgpt/lit_model.pth.lora"],
)
def test_a_file_that_is_cut_short_is_refused(fixture, tmp_path):
    """Half a file of any container is a FileError, never a crash or half an adapter."""
    data, hints = (FIXTURES / fixture).read_bytes(), li.Hints(alpha=1, heads=(4, 2))
    for n in (0, 5, 9, len(data) // 3, len(data) - 1):
        (tmp_path / "x").write_bytes(data[:n])
        try:
            file = li.read(tmp_path / "x", allow_pickle=True, hints=hints)
        except li.FileError:
            continue
        assert n == len(data) - 1  # padding, behind the last tensor
        assert is_same_record(file, li.read(FIXTURES / fixture, allow_pickle=True, hints=hints))


STARTS = {
    b"ggla....": "old llama.cpp",
    b"age-encryption.org/v1\n": "encrypted",
    b"version https://git-lfs.github.com": "git-lfs pointer",
    b"<html>": "a web page",
}


@pytest.mark.parametrize(("data", "message"), STARTS.items())
def test_foreign_files_are_named(data, message, tmp_path):
    """The first bytes tell what the file is, and the error says it in words."""
    (tmp_path / "adapter_model.safetensors").write_bytes(data + bytes(100))
    with pytest.raises(li.FileError, match=message):
        li.read(tmp_path)


def test_a_conversion_to_an_immense_tensor_is_refused(tmp_path):
    """Small factors may ask for a huge tensor (a 10^4 x 10^4 kernel on 10^4 channels), which is never allocated."""
    tensors = {
        "lora_unet_a.lora_down.weight": torch.ones(1, 10**4, 1, 1),
        "lora_unet_a.lora_up.weight": torch.ones(4, 1, 1, 1),
        "lora_unet_a.lora_mid.weight": torch.ones(1, 1, 10**3, 10**3),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(li.FileError, match=r"would need a tensor of shape \(1, 10000, 1000, 1000\)"):
        li.read(tmp_path / "x.safetensors")


JUNK = (None, "x", -1, 0, 1e400, [], {}, [[1]], {"a": {"b": 2}}, True, "../../x")
CONFIGS = (
    "peft_plain",
    "peft_params",
    "peft_tokens",
    "peft_dora",
    "mlx_lora",
    "adapterhub_gpt2",
    "peft_target_parameters/0.18.1/gptoss_ad",
)


@pytest.mark.parametrize("fixture", CONFIGS)
def test_configs_of_any_nonsense(fixture, tmp_path):
    """With any junk in any field, the file is read or is a FileError, never an error of Python's own."""
    source = FIXTURES / fixture
    for p in source.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    config = json.loads((source / "adapter_config.json").read_text())
    inner = config["config"] if "config" in config else config.get("lora_parameters", config)
    for fields in [config] if inner is config else [config, inner]:
        for field, value in list(fields.items()):
            for junk in JUNK:
                fields[field] = junk
                (tmp_path / "adapter_config.json").write_text(json.dumps(config))
                with contextlib.suppress(li.FileError):
                    assert li.read(tmp_path, allow_pickle=True).sites
            fields[field] = value


ODD = (
    torch.zeros(0),
    torch.ones(()),
    torch.ones(3),
    torch.ones(2, 3),
    torch.ones(3, 0),
    torch.ones(2, 1, 2, 1, 2),
    torch.full((2, 2), float("nan")),
    torch.ones(2, 2, dtype=torch.int8),
    torch.ones(2, 2, dtype=torch.bool),
    torch.ones(2, 2, dtype=torch.complex64),
)
TABLES = {
    "peft_dora": "adapter_model.safetensors",
    "peft_params": "adapter_model.safetensors",
    "peft_bias_all": "adapter_model.safetensors",
    "mlx_lora": "adapters.safetensors",
    "kohya_lycoris": "lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "litgpt": "lit_model.pth.lora",
    "loralib": "lora_bias.pt",
    "torchtune": "adapter_model.pt",
    "adapterhub_gpt2": "pytorch_adapter.bin",
}


@pytest.mark.parametrize(("folder", "name"), TABLES.items())
def test_tensors_of_any_nonsense(folder, name, tmp_path):
    """A tensor that is empty, misshapen, of another dtype or missing is a FileError, or the rest is read rightly."""
    source = FIXTURES / folder
    for p in source.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    safe, metadata = name.endswith(".safetensors"), {}
    if safe:
        with safe_open(source / name, framework="pt") as f:
            tensors, metadata = {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
    else:
        tensors = torch.load(source / name, weights_only=True)
        tensors = tensors.get("model", tensors)
    hints = li.Hints(
        alpha=6, heads=(4, 2), groups={"m101": [True, False, True], "m111": [True] * 3, "mf": [True, False, True]}
    )
    for key, t in list(tensors.items())[:6]:
        for odd in (*ODD, None):
            table = {k: v for k, v in tensors.items() if k != key} | ({} if odd is None else {key: odd})
            if safe:
                save_file(table, tmp_path / name, metadata)
            else:
                torch.save(table, tmp_path / name)
            with contextlib.suppress(li.FileError):
                file = li.read(tmp_path / name, allow_pickle=True, hints=hints)
                for s in file.sites:
                    assert s.A.numel()
                    assert s.A.shape[-2] == s.B.shape[-1]
                    assert s.A.is_floating_point()
                    assert s.A.isfinite().all()
                    assert s.B.isfinite().all()
        tensors[key] = t


def test_immense_tensor_names_are_refused(tmp_path):
    """Names are matched with patterns, so they may not be longer than any module's."""
    save_file({"a." * 10**5 + "lora_A.weight": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(li.FileError, match="names of more than 1024 characters"):
        li.read(tmp_path / "x.safetensors")


def test_configs_are_only_data(tmp_path):
    """Import paths are not followed, deep or long JSON is not parsed to its end, and YAML builds no objects."""
    folder = peft(
        tmp_path / "a",
        auto_mapping={"base_model_class": "system", "parent_library": "os"},
        runtime_config={"x": "os.mkdir"},
    )
    assert li.read(folder).sites
    (folder / "adapter_config.json").write_text("[" * 10**5)
    with pytest.raises(li.FileError, match="cannot be read as JSON"):
        li.read(folder)
    (folder / "adapter_config.json").write_text(" " * 2**25)
    with pytest.raises(li.FileError, match="more than 16,777,216 bytes"):
        li.read(folder)
    litgpt = tmp_path / "b"
    litgpt.mkdir()
    (litgpt / "lit_model.pth.lora").write_bytes((FIXTURES / "litgpt" / "lit_model.pth.lora").read_bytes())
    (litgpt / "hyperparameters.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']")
    with pytest.raises(li.FileError, match="cannot be read as YAML"):
        li.read(litgpt, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/b", ".."])
def test_names_never_become_paths(name, tmp_path):
    """An adapter's name from a file is never used as a path, nor as an adapter's name on a model."""
    from dataclasses import replace

    file = replace(li.read(peft(tmp_path / "a")), name=name)
    inside = tmp_path / "deep" / "er"
    before = set(tmp_path.rglob("*"))
    for format, form in li.FORMATS.items():
        place = inside / f"{format}{form.suffix}"
        try:
            li.write(file, place, format=format, hints=li.Hints(heads=(1, 1), architecture="llama", component="unet"))
        except li.FileError:
            continue
    assert all(p == inside.parent or p.is_relative_to(inside) for p in set(tmp_path.rglob("*")) - before)
    with pytest.raises(li.LoraError):
        li.load(torch.nn.Sequential(), inside / "lorainject")


def test_a_slice_of_an_immense_weight_is_not_padded(tmp_path):
    """The whole weight of a forged slice would need terabytes."""
    s = li.StoredSite(
        path="a", label="0:4", rows=(range(4),), shape=(2**40, 3), A=torch.ones(2, 3), B=torch.ones(4, 2), alpha=2
    )
    file = li.AdapterFile(path=tmp_path, format="lorainject", sites=(s,))
    with pytest.raises(li.FileError, match="would need a tensor"):
        li.write(file, tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())
