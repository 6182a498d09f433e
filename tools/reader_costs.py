"""What reading costs: memory per byte of the file, and time per megabyte, for every reader.

    PYTHONPATH=src python tools/reader_costs.py [--only FORMAT ...] [--megabytes 2 100] [--names 30000 300000]

Every file is read in a process by itself, by `li.read` without a model. Memory is the peak of the resident memory
(VmHWM) above what the process has after its imports, which are not counted. Time is the CPU time of one thread.

Files of names hold tensors of one element each (valid), or nothing but keys that belong to no site (strange). The time
of ten times as many names should be ten times as long; a ratio well above that is a reader that is not linear.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import lorainject as li
from lorainject.files.io import safetensors_file

ALPHA = 16.0
HEADS = (1, 1)
READ = li.Hints(alpha=ALPHA, heads=HEADS, component="unet")
PATH = "model.layers.{}.self_attn.{}"
VARIANTS = {"peft, pickle": "peft", "peft, tar": "peft", "mlx, npz": "mlx"}
"""Containers that a format's writer does not write, by the format whose tensors they hold."""
READERS = [*li.FORMATS, *VARIANTS]
KINDS = ("valid", "strange")
STRANGE = "model.layers.{}.norm.strange"


class Base(nn.Module):
    """What AdapterHub's writer asks of a base model."""

    config = SimpleNamespace(model_type="llama", hidden_size=8)


def record(megabytes: float) -> li.AdapterFile:
    """Return a record of q and v in as many layers as make a file of this size, in float32."""
    width, r = (4096, 16) if megabytes > 10 else (1024, 8)
    layers = max(1, round(megabytes * 1e6 / (2 * 2 * 4 * width * r)))
    return filled(layers, width, r)


def filled(layers: int, width: int, r: int) -> li.AdapterFile:
    """Return a record with random factors."""
    sites = [
        li.StoredSite(path=PATH.format(i, leaf), A=torch.randn(r, width), B=torch.randn(width, r), alpha=ALPHA)
        for i in range(layers)
        for leaf in ("q_proj", "v_proj")
    ]
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=tuple(sites))


def write(file: li.AdapterFile, reader: str, folder: Path) -> Path:
    """Write a record for a reader, and return the path of the file or directory."""
    name = VARIANTS.get(reader, reader)
    hints = li.Hints(heads=HEADS, architecture="llama", component="unet", model=Base())
    path = li.write(file, folder / f"a{li.FORMATS[name].suffix}", format=name, hints=hints).path
    return repacked(path, reader)


def repacked(path: Path, reader: str) -> Path:
    """Put the tensors of a directory into another container, for the readers in VARIANTS."""
    if reader == "peft, tar":
        with tarfile.open(path.with_suffix(".tar"), "w") as tar:
            tar.add(path, "a")
        return path.with_suffix(".tar")
    if reader not in VARIANTS:
        return path
    (source,) = path.glob("*.safetensors")
    tensors, _ = safetensors_file.read(source)
    source.unlink()
    if reader == "peft, pickle":
        torch.save(tensors, source.with_suffix(".bin"))
    else:
        import numpy

        numpy.savez(source.with_suffix(".npz"), **{key: t.numpy() for key, t in tensors.items()})
    return path


def write_names(count: int, kind: str, reader: str, folder: Path) -> Path:
    """Write a file with so many tensors for a reader: a small one as the pattern, whose pairs are repeated."""
    if (reader, kind) == ("lorainject", "valid"):  # whose header describes every site
        path = folder / "a.safetensors"
        ((_, pieces),) = li.FORMATS[reader].write(filled(count // 4, 2, 1), path, READ).items()
        path.write_bytes(b"".join(pieces or ()))
        return path
    path = write(filled(1, 2, 1), reader, folder)
    file = path if path.is_file() else next(p for p in path.iterdir() if not p.name.endswith((".json", ".yaml")))
    tensors, metadata = read_container(file)
    memory = torch.ones(count, max(t.numel() for t in tensors.values()))
    many: dict[str, Tensor] = {}
    keys = list(tensors)
    for n in range(count):
        key = keys[n % len(keys)]
        name = numbered(key, n // len(keys)) if kind == "valid" else STRANGE.format(n)
        many[name] = memory[n, : tensors[key].numel()].view(tensors[key].shape)
    write_container(file, many, metadata)
    return path


def numbered(key: str, layer: int) -> str:
    """Return the key with this number of the layer in place of 0."""
    for old in ("layers.0.", "layers_0_", "h.0.", "blk.0."):
        key = key.replace(old, old.replace("0", str(layer)))
    return key


def read_container(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, and the metadata of its header."""
    from lorainject.files.io import containers

    if file.suffix == ".tar":
        with tarfile.open(file) as tar:
            data = tar.extractfile("a/adapter_model.safetensors")
            assert data is not None
            return safetensors_file.parse(data.read(), file)
    return containers.READERS[containers.detect(file)](file)


def write_container(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write the tensors in the container that a file has."""
    if file.suffix == ".gguf":
        import gguf

        writer = gguf.GGUFWriter(file, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", ALPHA)
        for key, t in tensors.items():
            writer.add_tensor(key, t.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    elif file.suffix == ".onnx_adapter":
        import onnxruntime

        adapter = onnxruntime.AdapterFormat()
        adapter.set_adapter_version(1)
        adapter.set_model_version(1)
        arrays = {key: t.numpy() for key, t in tensors.items()}
        adapter.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(a) for key, a in arrays.items()})
        adapter.export_adapter(str(file))
    elif file.suffix == ".npz":
        import numpy

        numpy.savez(file, **{key: t.numpy() for key, t in tensors.items()})
    elif file.suffix == ".tar":
        with tarfile.open(file) as tar:
            config = tar.extractfile("a/adapter_config.json")
            assert config is not None
            members = {"a/adapter_config.json": config.read()}
        members["a/adapter_model.safetensors"] = b"".join(safetensors_file.dump(tensors, metadata))
        with tarfile.open(file, "w") as tar:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    elif file.suffix == ".safetensors":
        file.write_bytes(b"".join(safetensors_file.dump(tensors, metadata)))
    else:
        torch.save({"model": tensors} if file.suffix == ".lora" else tensors, file)


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def measure(path: Path, reader: str) -> dict[str, Any]:
    """Read a file, and return what it took."""
    import gguf
    import numpy
    import onnxruntime

    assert all((gguf, numpy, onnxruntime))  # whose imports are not the reader's cost
    torch.set_num_threads(1)
    size = sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
    with tempfile.TemporaryDirectory() as folder:  # what is set up once, at the first file
        li.read(write(filled(1, 2, 1), reader, Path(folder)), allow_pickle=True, hints=READ)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, start = resident("VmRSS"), time.process_time()
    try:
        file = li.read(path, allow_pickle=True, hints=READ)
        result = f"{len(file.sites)} sites"
    except li.LoraError as e:
        result = f"refused: {len(e.problems)} problems"
    seconds = time.process_time() - start
    return {"bytes": size, "seconds": seconds, "peak": max(0, resident("VmHWM") - before), "result": result}


def in_child(*arguments: object) -> dict[str, Any]:
    """Run this program with these arguments, and return what it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def columns(reader: str, megabytes: list[float], names: list[int]) -> Iterator[str]:
    """Yield the cells of a reader's row."""
    for size in megabytes:
        m = in_child("--reader", reader, "--size", size)
        yield f"{m['peak'] / m['bytes']:.1f}"
        yield f"{m['seconds'] / m['bytes'] * 1e6:.4f}"
    for kind in KINDS:
        few, many = (in_child("--reader", reader, "--count", n, "--kind", kind) for n in names)
        yield f"{many['seconds']:.1f}"
        yield f"{many['seconds'] / few['seconds']:.1f}"
        yield f"{many['peak'] / 2**20:.0f}"


def main() -> None:
    """Measure the readers in processes of their own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=READERS, default=READERS)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[2, 100])
    parser.add_argument("--names", type=int, nargs=2, default=[30_000, 300_000])
    parser.add_argument("--reader", choices=READERS, help="measure one file of this reader in this process")
    parser.add_argument("--size", type=float)
    parser.add_argument("--count", type=int)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--path", type=Path)
    options = parser.parse_args()
    if options.path:
        print(json.dumps(measure(options.path, options.reader)))
    elif options.reader:
        with tempfile.TemporaryDirectory() as folder:
            if options.size:
                path = write(record(options.size), options.reader, Path(folder))
            else:
                path = write_names(options.count, options.kind, options.reader, Path(folder))
            print(json.dumps(in_child("--reader", options.reader, "--path", path)))
    else:
        sizes = [f"{size:g} MB: peak / bytes | s per MB" for size in options.megabytes]
        few, many = (f"{n:,}" for n in options.names)
        for kind in KINDS:
            sizes.append(f"{many} {kind} names: s | to {few} | MiB")
        heads = " | ".join(["reader", *sizes])
        print(f"| {heads} |\n|{'---|' * (heads.count('|') + 1)}")
        for reader in options.only:
            print(f"| {reader} | {' | '.join(columns(reader, options.megabytes, options.names))} |", flush=True)


if __name__ == "__main__":
    main()
