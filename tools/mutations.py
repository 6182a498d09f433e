"""Damaged and hostile adapter files: mutations of real files that know the containers.

`mutated(files, rng)` changes one to three things: bits, lengths, fields of headers and configs, members of archives, or
the tensors (their names, shapes, dtypes, values, storages). The container is then put together again with correct
checksums, so that the readers behind it get to see the change. `disturb_folder` puts a link, a pipe, a directory or a
sparse file in a file's place.

The same random state gives the same mutation. (The bytes may still differ: gzip holds a time, old torch pickles hold
addresses.)
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from lorainject.files.formats import native
from lorainject.files.io import safetensors_file
from lorainject.files.io.containers import check_gguf

NUMBERS = (
    0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**63 - 1, 2**63,
    2**64 - 1,
)  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, False, "", "x", "../../x", "a" * 5000, "\0", "\ud800", -1, 0, 1, 2**31, 2**63, 2**70, 1e-320, 1e308,
    float("nan"), float("inf"), [], {}, [[]], {"": {}}, [None], ["(a|aa)+$"], {"(.*)*x": 3}, "float16", "LORA",
    "all-linear", [1, 2], {"a": [1]},
)  # fmt: skip
SUFFIXES = (
    ".lora_A.weight", ".lora_B.weight", ".lora_A", ".lora_B", ".lora_a", ".lora_b", ".lora_a.weight", ".lora_b.weight",
    ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".alpha", ".dora_scale", ".lora_magnitude_vector",
    ".lora_embedding_A", ".lora_embedding_B", ".m", ".magnitude", ".lora_B.bias", ".bias", ".weight",
    ".token_adapter.trainable_tokens_delta", ".lora_A.default.weight", ".base_layer.lora_A.weight", ".diff",
    ".hada_w1_a", ".scale", ".loras.a.lora_A", "",
)  # fmt: skip
PREFIXES = (
    "", "base_model.model.", "lora_unet_", "lora_te_", "unet.", "text_encoder.", "transformer.h.0.attn.",
    "layers.0.attn.", "model.layers.0.mlp.experts.0.", "blk.0.", "model.layers.99999999999999999999.",
    "model.layers.0.mlp.switch_mlp.", "roberta.encoder.layer.0.", ".", "..", "a" * 2000, "_orig_mod.",
    "module.base_model.model.", "base_model.model._fsdp_wrapped_module.", "diffusion_model.", "transformer.",
)  # fmt: skip
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool, torch.complex64,
)  # fmt: skip
Rng = random.Random
Mutation = Callable[[bytes, Rng], bytes]


def mutated(files: dict[str, bytes], rng: Rng) -> dict[str, bytes]:
    """Return the files with one to three things wrong with them."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(files))
        files[name] = mutated_bytes(files[name], rng)
    if len(files) > 1 and rng.random() < 0.03:
        del files[rng.choice(sorted(files))]
    return files


def mutated_bytes(data: bytes, rng: Rng) -> bytes:
    """Return the bytes with one mutation that knows their container, or of the plain bytes if they are in none."""
    mutations = next((mutations for is_container, mutations in MUTATIONS if is_container(data)), ())
    mutation = rng.choice((*mutations, *mutations, *BYTES))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mutation(data, rng)
    except Exception:  # after an earlier mutation the container cannot be opened any more
        return rng.choice(BYTES)(data, rng)


# --- bytes ---


def _flip_bits(data: bytes, rng: Rng) -> bytes:
    new = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        new[_position(new, rng)] ^= 1 << rng.randrange(8)
    return bytes(new)


def _truncate(data: bytes, rng: Rng) -> bytes:
    return data[: rng.choice((0, 1, 8, 9, len(data) // 2, max(len(data) - 1, 0), rng.randrange(len(data) + 1)))]


def _overwrite_number(data: bytes, rng: Rng) -> bytes:
    """Overwrite some bytes with a number."""
    form = rng.choice("BHIQ")
    value = struct.pack(f"<{form}", rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(form)))
    at = _position(data, rng)
    at -= at % len(value) * (rng.random() < 0.5)
    return data[:at] + value + data[at + len(value) :]


def _copy_piece(data: bytes, rng: Rng) -> bytes:
    """Copy a piece of the bytes to another place."""
    a, b, n = _position(data, rng), _position(data, rng), rng.choice((1, 4, 8, 64, 1024))
    return data[:a] + data[b : b + n] + data[a + n * rng.randrange(2) :]


def _position(data: bytes | bytearray, rng: Rng) -> int:
    """Return a random position, more often near the start, where headers are."""
    n = max(len(data), 1)
    return rng.randrange(min(n, rng.choice((16, 64, 512, 4096, n, n))))


BYTES: tuple[Mutation, ...] = (_flip_bits, _truncate, _overwrite_number, _copy_piece)


# --- values in JSON ---


def _mutate_json(data: bytes, rng: Rng) -> bytes:
    text = _to_json(mutated_tree(json.loads(data), rng))
    return (_with_name_twice(text, rng) if rng.random() < 0.1 else text).encode(errors="surrogatepass")


def _with_name_twice(text: str, rng: Rng) -> str:
    """Return the text of a JSON object in which one name occurs twice, with different values."""
    value = json.loads(text)
    if not isinstance(value, dict) or not value:
        return text
    twice = json.dumps({rng.choice(list(value)): _replacement(rng.choice(list(value.values())), rng)})
    return f"{twice[:-1]}, {text.lstrip()[1:]}" if rng.random() < 0.5 else f"{text.rstrip()[:-1]}, {twice[1:]}"


def _to_json(value: Any) -> str:
    deep = value == "DEEP"
    return "[" * 50_000 if deep else json.dumps(value).replace('"DEEP"', "[" * 200 + "]" * 200)


def mutated_tree(tree: Any, rng: Rng) -> Any:
    """Return a tree of JSON values with one value or key changed."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.05:
        return _replacement(tree, rng)
    new: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    key = rng.choice(list(new)) if isinstance(new, dict) else rng.randrange(len(new))
    what = rng.random()
    if isinstance(new[key], dict | list) and new[key] and what < 0.7:
        new[key] = mutated_tree(new[key], rng)
    elif what < 0.8:
        new[key] = _replacement(new[key], rng)
    elif what < 0.9 and isinstance(new, dict):
        new[rng.choice((*new, *PREFIXES, "r", "peft_type", "lora_parameters"))] = new.pop(key)
    elif isinstance(new, dict):
        del new[key]
    else:
        new = new * rng.choice((0, 2, 100))
    return new


def _replacement(value: Any, rng: Rng) -> Any:
    if isinstance(value, bool) and rng.random() < 0.5:
        return not value
    if isinstance(value, int | float) and rng.random() < 0.5:
        return rng.choice((*NUMBERS, -value, value + 1, value * 2, value / 3))
    if isinstance(value, str) and rng.random() < 0.3:
        return rng.choice(PREFIXES) + value + rng.choice(SUFFIXES)
    return "DEEP" if rng.random() < 0.03 else rng.choice(JUNK)


# --- tensors ---


def mutated_tensors(tensors: dict[str, Tensor], rng: Rng) -> dict[str, Tensor]:
    """Return the tensors with one of them renamed, left out, doubled, exchanged or changed."""
    new = dict(tensors)
    key, other = rng.choice(list(new)), rng.choice(list(new))
    what = rng.random()
    if what < 0.25:
        new[_rename(key, other, rng)] = new.pop(key)
    elif what < 0.35:
        del new[key]
    elif what < 0.45:
        new[_rename(key, other, rng)] = new[key].clone()
    elif what < 0.55:
        new[key], new[other] = new[other], new[key]
    else:
        new[key] = mutated_tensor(new[key], rng)
    return new


def _rename(key: str, other: str, rng: Rng) -> str:
    for suffix in SUFFIXES[:-1]:
        if key.endswith(suffix) and rng.random() < 0.5:
            return key.removesuffix(suffix) + rng.choice(SUFFIXES)
    parts = key.split(".")
    parts[rng.randrange(len(parts))] = rng.choice(
        (*other.split("."), "", "0", "-1", str(2**40), "experts", "base_layer", "\N{LATIN SMALL LETTER SHARP S}")
    )
    return rng.choice(
        (".".join(parts), rng.choice(PREFIXES) + key, key.partition(".")[2], key + rng.choice(SUFFIXES), "")
    )


def mutated_tensor(t: Tensor, rng: Rng) -> Tensor:
    """Return the tensor with another shape, dtype or value."""
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: t.flatten(), lambda: t.unsqueeze(rng.randrange(t.ndim + 1)),
        lambda: t.transpose(0, -1) if t.ndim else t, lambda: t[:0] if t.ndim else t[None],
        lambda: t[:1] if t.ndim else t[None, None], lambda: t[..., :1] if t.ndim else t,
        lambda: t.repeat(2, *[1] * (t.ndim - 1)) if t.ndim else t, lambda: t.to(rng.choice(DTYPES)),
        lambda: t.to(rng.choice(DTYPES)), lambda: t * 0, lambda: t * float("nan"), lambda: t.double() * 1e300,
        lambda: t.float() * 1e38,
        lambda: torch.zeros(rng.choice(((), (0,), (1,), (1, 1), (0, 3), (3, 0), (1, 1, 1), (1, 1, 1, 1, 1, 1, 1)))),
        lambda: torch.ones(1, 1).expand(3, 2).clone(),
        lambda: torch.full((), rng.choice((0.0, -1.0, 1e308, float("inf"), 3.0))), lambda: torch.zeros(1, 20_000),
        lambda: torch.zeros(20_000, 1), lambda: torch.zeros(1, 1, 1000, 1000), lambda: t.reshape(-1, 1),
    )  # fmt: skip
    return rng.choice(ways)().contiguous()


# --- containers ---


def _split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def _join_header(header: Any, body: bytes) -> bytes:
    text = _to_json(header).encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _mutate_header(data: bytes, rng: Rng) -> bytes:
    """Change anything in the header of a safetensors file."""
    header, body = _split_header(data)
    return _join_header(mutated_tree(header, rng), body)


def _mutate_metadata(data: bytes, rng: Rng) -> bytes:
    """Change a value in a safetensors file's metadata, which may be JSON. lorainject's record gets a new digest."""
    header, body = _split_header(data)
    about = dict(header["__metadata__"])
    key = rng.choice(list(about))
    try:
        about[key] = _to_json(mutated_tree(json.loads(about[key]), rng))
    except ValueError:
        about[key] = rng.choice(("", "x", "{}", "[]", "[" * 10**5, '{"sites": 3}'))
    return _with_digest(_join_header(header | {"__metadata__": about}, body))


def _mutate_safetensors(data: bytes, rng: Rng) -> bytes:
    """Change the tensors of a safetensors file, sorted, because safetensors loads them in random order."""
    tensors, metadata = safetensors_file.parse(data, Path("x"))
    new = mutated_tensors(dict(sorted(tensors.items())), rng)
    known = {
        key: t if t.dtype in safetensors_file.DTYPE_NAMES else t.double() if t.dtype.is_complex else t.int()
        for key, t in new.items()
    }
    return _with_digest(b"".join(safetensors_file.dump(known, metadata)))


def _with_digest(data: bytes) -> bytes:
    tensors, metadata = safetensors_file.parse(data, Path("x"))
    if native.KEY not in metadata:
        return data
    body = json.loads(metadata[native.KEY])
    body.pop("digest", None)
    metadata[native.KEY] = json.dumps(body | {"digest": native.digest(body, tensors)})
    return b"".join(safetensors_file.dump(tensors, metadata))


def _mutate_pickle(data: bytes, rng: Rng) -> bytes:
    """Change the tensors of a torch pickle, or put other objects among them."""
    value = torch.load(io.BytesIO(data), weights_only=True)
    wrapped = isinstance(value.get("model"), dict)
    new: dict[Any, Any] = mutated_tensors(value["model"] if wrapped else value, rng)
    key = rng.choice(list(new)) if new else "x"
    odd = (
        None, 3, "x", {"a": torch.ones(2)}, [torch.ones(2)], torch.ones(2, 3).to_sparse(),
        torch.ones(2, 2, device="meta"), torch.nn.Parameter(torch.ones(2, 3)),
        torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8), torch.ones(1).expand(10**9),
        torch.ones(2, 3).to_sparse_csr(), torch.eye(3).to(torch.float8_e4m3fn), torch.ones(2, 3).conj(),
        torch.complex(torch.ones(2), torch.ones(2)).conj(), torch.ones(6).as_strided((2, 2), (1, 1)),
    )  # fmt: skip
    if rng.random() < 0.3:
        new[rng.choice((key, key, 3, ("a", "b")))] = rng.choice(odd)
    if rng.random() < 0.15:
        new = _views_of_one_storage(new, rng)
    whole: Any = {"model": new} if wrapped else new
    whole = rng.choice(
        (whole,) * 20 + ([*new.values()], {"state_dict": whole}, {"model": {"model": whole}}, None, new.get(key))
    )
    out = io.BytesIO()
    torch.save(whole, out, _use_new_zipfile_serialization=rng.random() < 0.8)
    return out.getvalue()


def _views_of_one_storage(tensors: dict[Any, Any], rng: Rng) -> dict[Any, Any]:
    """Return the tensors as views of one storage, each at another offset, and sometimes many more of them."""
    dense = {key: t for key, t in tensors.items() if isinstance(t, Tensor) and t.dtype == torch.float32 and t.numel()}
    storage = torch.linspace(-1, 1, 2 * max((t.numel() for t in dense.values()), default=1))
    new = dict(tensors)
    for key, t in dense.items():
        start = rng.randrange(len(storage) - t.numel() + 1)
        new[key] = storage[start : start + t.numel()].view(t.shape)
    copies = rng.choice((0, 0, 1000))
    return new | {f"{n}.{key}": t for key, t in list(dense.items())[:2] for n in range(copies)}


def _mutate_zip_members(data: bytes, rng: Rng) -> bytes:
    """Change a member's bytes or name in a zip archive, or the list of members, with correct checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        members = {name: z.read(name) for name in z.namelist()}
    name = rng.choice(list(members))
    what = rng.random()
    if what < 0.6:
        name = next((n for n in members if n.endswith("data.pkl")), name) if rng.random() < 0.6 else name
        members[name] = rng.choice(BYTES)(members[name], rng)
    elif what < 0.8:
        members[rng.choice(("../../x", "/x", "x.npy", name + "2", "archive/version", "archive/byteorder"))] = (
            members.pop(name)
        )
    elif what < 0.9:
        del members[name]
    else:
        members["archive/bomb"] = bytes(10**6)
    out = io.BytesIO()
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out, "w") as z:
        for n, content in members.items():
            z.writestr(zipfile.ZipInfo(n), content, compression)
    return out.getvalue()


def _mutate_npz(data: bytes, rng: Rng) -> bytes:
    """Change the arrays of an npz file."""
    with numpy.load(io.BytesIO(data)) as arrays:
        new = mutated_tensors({key: torch.from_numpy(arrays[key]) for key in arrays.files}, rng)
    out = io.BytesIO()
    numpy.savez(out, **{key: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for key, t in new.items()})
    return out.getvalue()


def _mutate_gguf(data: bytes, rng: Rng) -> bytes:
    """Change the tensors and the alpha of a GGUF file."""
    import gguf

    check_gguf(io.BytesIO(data), len(data))  # gguf's reader would loop by the counts of an earlier mutation
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_bytes(data)
        reader = gguf.GGUFReader(Path(folder) / "a")
        new = mutated_tensors({str(t.name): torch.from_numpy(t.data.copy()) for t in reader.tensors}, rng)
        writer = gguf.GGUFWriter(
            Path(folder) / "b", rng.choice(("llama", "llama", "llama", "qwen2", "gpt2", "x" * 300))
        )
        writer.add_type(rng.choice(("adapter", "adapter", "adapter", "model")))
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", rng.choice((8.0, 8.0, 0.0, -1.0, 3e38, float("nan"))))
        if rng.random() < 0.2:
            writer.add_array("adapter.x", rng.choice(([1, 2], ["a", "b"], [0.5])))
        for key, t in new.items():
            writer.add_tensor(
                key,
                (
                    t
                    if t.dtype in (torch.float64, torch.float32, torch.float16, torch.int8, torch.int32, torch.int64)
                    else t.float()
                ).numpy(),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if new and rng.random() < 0.2:
            return _with_overlap(Path(folder) / "b", rng)
        return (Path(folder) / "b").read_bytes()


def _with_overlap(path: Path, rng: Rng) -> bytes:
    """Return a GGUF file whose tensors begin where other tensors do, or within them."""
    import gguf

    data = bytearray(path.read_bytes())
    tensors = gguf.GGUFReader(path).tensors
    offsets = [int(t.field.parts[-1][0]) for t in tensors]
    for t in tensors:
        if rng.random() < 0.7:
            place = t.field.offset + sum(int(part.nbytes) for part in t.field.parts[:-1])
            data[place : place + 8] = struct.pack("<Q", rng.choice(offsets) + rng.choice((0, 0, 32, 4, -32)) % 2**64)
    return bytes(data)


def _mutate_tar(data: bytes, rng: Rng) -> bytes:
    """Change a member's bytes, name or kind in a tar archive."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(m, f.read() if (f := tar.extractfile(m)) else b"") for m in tar]
    n = rng.randrange(len(members))
    member, content = members[n]
    what = rng.random()
    if what < 0.6:
        content = mutated_bytes(content, rng)
    elif what < 0.8:
        member.name = rng.choice(
            ("../x", "/x", "model_config.yaml", "a/" * 40 + member.name, member.name + "x", "adapter_config.json")
        )
    else:
        member.type = rng.choice(
            (
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.CHRTYPE,
                tarfile.DIRTYPE,
                tarfile.FIFOTYPE,
                tarfile.GNUTYPE_SPARSE,
            )
        )
    members[n] = member, content
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=rng.choice(("w", "w", "w:gz"))) as tar:
        for m, c in members * rng.choice((1, 1, 1, 2)):
            m.size = len(c)
            tar.addfile(m, io.BytesIO(c))
    return out.getvalue()


def _mutate_yaml(data: bytes, rng: Rng) -> bytes:
    lines = data.decode().splitlines()
    n = rng.randrange(len(lines))
    bomb = [
        "a: &a [x, x]",
        *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    ]
    values = ("", "-1", "1.5", "x", "[1]", "{}", "true", "2001-01-01", "!!python/name:os.system", "9" * 50, "*a",
              ".inf", "0x10", "&a 3", "1:30", "190:20:30.15", "-9" + ":59" * 3000,
              "!!float 1" + ":0" * 3000)  # fmt: skip
    new = (": ".join((lines[n].partition(":")[0], rng.choice(values))), "", "- x", "? [a]", "\t", "[" * 3000)
    lines[n : n + 1] = bomb if rng.random() < 0.05 else [rng.choice((new[0],) * 8 + new)]
    return "\n".join(lines).encode()


# --- files that are no plain files ---


def disturb_folder(folder: Path, rng: Rng) -> None:
    """Put something else in the place of one file of a folder: a link, a pipe, a directory, or a sparse file."""
    path, what = rng.choice(sorted(folder.iterdir())), rng.randrange(6)
    data = path.read_bytes()
    if what < 2:
        start = _announcing_holes() if what else data
        path.write_bytes(start)
        os.truncate(path, len(start) + 2 ** rng.choice((30, 34, 40)) if start is data else len(start) + 2**34)
        return
    path.unlink()
    if what == 2:
        os.mkfifo(path)
    elif what == 3:
        path.mkdir()
    elif what == 4:
        path.symlink_to(rng.choice((path.name, "/dev/zero", "/dev/stdin", "/nowhere", ".", "/proc/self/mem", "..")))
    else:  # an innocent link
        (folder / "elsewhere").write_bytes(data)
        path.symlink_to("elsewhere")


def _announcing_holes() -> bytes:
    """Return the beginning of a safetensors file whose two tensors fill 16 GiB."""
    half = 2**33
    keys = ("base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight")
    return _join_header(
        {
            key: {"dtype": "F32", "shape": [half // 4096, 1024], "data_offsets": [i * half, (i + 1) * half]}
            for i, key in enumerate(keys)
        },
        b"",
    )


def _is_zip_of(data: bytes, end: str) -> bool:
    return data[:4] == b"PK\x03\x04" and end.encode() in data


MUTATIONS: tuple[tuple[Callable[[bytes], bool], tuple[Mutation, ...]], ...] = (
    (lambda d: d[:1] == b"{", (_mutate_json,)),
    (lambda d: d[4:9] == b"\0\0\0\0{", (_mutate_header, _mutate_metadata, _mutate_safetensors, _mutate_safetensors)),
    (lambda d: d[:4] == b"GGUF", (_mutate_gguf,)),
    (lambda d: _is_zip_of(d, ".npy"), (_mutate_zip_members, _mutate_npz)),
    (lambda d: _is_zip_of(d, "data.pkl"), (_mutate_zip_members, _mutate_pickle, _mutate_pickle)),
    (lambda d: d[:2] in (b"\x80\x02", b"\x80\x03"), (_mutate_pickle,)),
    (lambda d: d[257:262] == b"ustar" or d[:2] == b"\x1f\x8b", (_mutate_tar,)),
    (lambda d: d[:40].isascii() and b": " in d[:200], (_mutate_yaml,)),
)
