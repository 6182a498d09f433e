"""Feed mutations of real adapter files to every reader: `scripts/fuzz [--minutes N] [--only READER] [--first N]`.

An input is one of a reader's real files with something wrong in it (mutations.py). It is read; if that succeeds, it is
described, written in lorainject's own format and in one other format, and read back; our own format must give the same
record again. All of this must end within SECONDS, must take at most MEMORY bytes of address space more than the process
had at its start, and must raise nothing but LoraError.

A child process does this under RLIMIT_AS. The parent kills the child when an input takes longer than SECONDS, and
starts a new child after whatever kills it. A reader and a number name an input: `--only READER --first N --count 1`
repeats it. The first input of each kind of failure is written to a folder in --out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import resource
import select
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file

import lorainject as li
from lorainject.files.describe import describe
from lorainject.files.io.open_adapter import CONFIGS, FILES

from mutations import disturb_folder, mutated
from oracle import FIXTURES, module_tree

SECONDS = 10.0  # for one input
MEMORY = 2**31  # bytes of address space for one child, in addition to what it starts with
BATCH = 3000  # inputs per child process
STRANGE = 0.05  # share of the inputs in which a file is a link, a pipe, a directory or sparse
TURN = 20.0  # seconds after which the next reader takes its turn
PACKAGE = Path(li.__file__).resolve().parent
LINEARS = {
    f"model.layers.{layer}.{path}.weight": shape
    for layer in range(2)
    for path, shape in (("self_attn.q_proj", (16, 8)), ("self_attn.k_proj", (8, 8)), ("mlp.up_proj", (12, 8)))
}


@dataclass
class Seed:
    """A real adapter, file or directory, that mutations start from."""

    files: dict[str, bytes]
    file: str = ""
    """The one of `files` whose path is passed to `li.read`; empty for the path of the directory."""
    hints: li.Hints = field(default_factory=li.Hints)


def directory_seed(path: Path, **hints: Any) -> Seed:
    """Return the seed that consists of all adapter and config files of a directory."""
    files = {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name in (*FILES, *CONFIGS)}
    return Seed(files, hints=li.Hints(**hints))


def file_seed(path: Path, **hints: Any) -> Seed:
    """Return the seed that consists of one file."""
    return Seed({path.name: path.read_bytes()}, path.name, li.Hints(**hints))


def seeds() -> dict[str, list[Seed]]:
    """Return the seeds of each reader, from the fixtures. Containers without a fixture are made from other fixtures."""
    names = ("plain", "dora", "lora_bias", "bias_all", "bias_lora_only", "tokens", "params")
    peft = [directory_seed(FIXTURES / f"peft_{name}") for name in names]
    peft += [directory_seed(p) for p in sorted((FIXTURES / "peft_target_parameters").glob("*/*_ad"))]
    base = load_file(FIXTURES / "kohya_lycoris" / "base.safetensors")
    model = module_tree({key: tuple(t.shape) for key, t in base.items()})
    groups = {"m101": [True, False, True], "m111": [True] * 3, "mf": [True, False, True]}
    with tempfile.TemporaryDirectory() as folder:
        natives = [_native_seed(Path(folder), name) for name in ("plain", "dora", "tokens", "params", "bias_all")]
        llama = li.inject(module_tree(LINEARS), ["q_proj", "re:.*k_proj"], r=2)
        natives.append(directory_seed(li.save(llama, Path(folder) / "llama")))
        natives.append(file_seed(li.save(llama, Path(folder) / "llama.safetensors")))
    loralib = [f"{name}.pt" for name in ("lora", "lora_bias", "full_train_mode")]
    kohya, gguf = FIXTURES / "kohya_lycoris" / "lora.safetensors", FIXTURES / "gguf" / "lora.gguf"
    torchtune, pipeline = FIXTURES / "torchtune", FIXTURES / "diffusers"
    return {
        "lorainject": natives,
        "peft": peft,
        "tar": [_tar_seed(peft[0], "w"), _tar_seed(peft[1], "w:gz")],
        "kohya": [
            file_seed(kohya),
            file_seed(kohya, component="unet", model=model),
            file_seed(pipeline / "kohya.safetensors"),
        ],
        "diffusers": [
            directory_seed(pipeline),
            file_seed(pipeline / "no_header.safetensors"),
            file_seed(pipeline / "pytorch_lora_weights.safetensors", component="unet"),
        ],
        "mlx": [directory_seed(FIXTURES / "mlx_lora"), _npz_seed(FIXTURES / "mlx_lora")],
        "gguf": [file_seed(gguf, heads=(4, 2)), file_seed(gguf, heads=(4, 2), model=module_tree(LINEARS))],
        "torchtune": [
            directory_seed(torchtune, alpha=6, heads=(4, 2)),
            file_seed(torchtune / "adapter_model.pt", alpha=6, heads=(4, 2)),
        ],
        "litgpt": [directory_seed(FIXTURES / "litgpt", heads=(4, 2)), directory_seed(FIXTURES / "litgpt")],
        "loralib": [file_seed(FIXTURES / "loralib" / name, alpha=6, groups=groups) for name in loralib],
        "adapterhub": [directory_seed(FIXTURES / f"adapterhub_{name}") for name in ("bert", "gpt2")],
        "onnx": [file_seed(FIXTURES / "onnx_adapter" / "a.onnx_adapter")],
    }


def _native_seed(folder: Path, variant: str) -> Seed:
    li.write(li.read(FIXTURES / f"peft_{variant}"), folder / variant)
    return directory_seed(folder / variant)


def _tar_seed(seed: Seed, mode: Any) -> Seed:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in seed.files.items():
            member = tarfile.TarInfo(f"adapter/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Seed({"a.tar": out.getvalue()}, "a.tar")


def _npz_seed(folder: Path) -> Seed:
    import numpy

    out = io.BytesIO()
    numpy.savez(out, **{key: t.float().numpy() for key, t in load_file(folder / "adapters.safetensors").items()})
    return Seed({"adapters.npz": out.getvalue(), "adapter_config.json": (folder / "adapter_config.json").read_bytes()})


def mutated_input(reader: str, n: int, reader_seeds: list[Seed]) -> tuple[Seed, dict[str, bytes]]:
    """Return the seed that input `n` of a reader starts from, and the mutated files."""
    rng = random.Random(f"{reader} {n}")
    seed = rng.choice(reader_seeds)
    return seed, mutated(seed.files, rng)


def write_files(files: dict[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def write_input(reader: str, n: int, reader_seeds: list[Seed], folder: Path) -> Seed:
    """Write input `n` of a reader, and return its seed. Some inputs have a link, a pipe or a hole in a file's place."""
    seed, files = mutated_input(reader, n, reader_seeds)
    write_files(files, folder)
    rng = random.Random(f"{reader} {n} folder")
    if rng.random() < STRANGE:
        disturb_folder(folder, rng)
    return seed


def try_input(path: Path, hints: li.Hints, n: int) -> str:
    """Read an adapter, describe it, write it in two formats and read those back.

    Returns:
        "refused" if reading raised a LoraError, else "read".

    Raises:
        Exception: Whatever is no LoraError, and MemoryError for an allocation that failed. Both are findings.
    """
    try:
        file = li.read(path, allow_pickle=True, hints=hints)
        json.dumps(describe(file))
    except li.LoraError as e:
        _raise_memory_error(e)
        return "refused"
    for name in ("lorainject", list(li.FORMATS)[n % len(li.FORMATS)]):
        full_hints = replace(hints, heads=(4, 2), architecture="llama", component=hints.component or "unet")
        target = path.parent / "out" / f"{name}{li.FORMATS[name].suffix}"
        try:
            conversion = li.write(file, target, format=name, lossy=n % 2 == 0, hints=full_hints)
            if name == "lorainject":  # which holds everything, and needs no hint
                require_same(file, li.read(conversion.path))
            li.read(conversion.path, allow_pickle=True, hints=replace(full_hints, alpha=1.0))
        except li.LoraError as e:
            _raise_memory_error(e)
    return "read"


def require_same(a: li.AdapterFile, b: li.AdapterFile) -> None:
    """Raise AssertionError unless two records have the same sites, to the bit, and replace the same tensors."""
    assert sorted(s.name for s in a.sites) == sorted(s.name for s in b.sites), "other sites"
    others = {s.name: s for s in b.sites}
    for s in a.sites:
        other = others[s.name]
        assert s.scale == other.scale, "another scale"
        assert torch.equal(s.A, other.A), "another A"
        assert torch.equal(s.B, other.B), "another B"
        assert (s.magnitude is None) == (other.magnitude is None), "another magnitude"
    assert a.replaced.keys() == b.replaced.keys(), "other replaced tensors"
    assert a.tokens.keys() == b.tokens.keys(), "other token rows"


def _raise_memory_error(e: BaseException | None) -> None:
    """Raise MemoryError if a failed allocation is among the causes of `e`: a reader must not hide one."""
    while e is not None:
        if isinstance(e, MemoryError) or "cannot allocate memory" in str(e):
            raise MemoryError(str(e)) from e
        e = e.__cause__ or e.__context__


def signature(e: BaseException) -> str:
    """Return the exception's type, the innermost function of lorainject that it passed through, and its first line."""
    frames = traceback.extract_tb(e.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(PACKAGE)]
    where = f"in {Path(inside[-1].filename).name}:{inside[-1].name}" if inside else "outside lorainject"
    return f"{type(e).__name__} {where}: {str(e).partition(chr(10))[0][:100]}"


def run_in_child(reader: str, reader_seeds: list[Seed], first: int, count: int, report: TextIO) -> None:
    """Try one input after another. Write a line with its number before each, and a line with its result after it."""
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    warnings.simplefilter("ignore")
    for n in range(first, first + count):
        with tempfile.TemporaryDirectory(dir=os.environ.get("FUZZ_TMP")) as folder:
            print(json.dumps({"n": n}), file=report, flush=True)
            try:
                seed = write_input(reader, n, reader_seeds, Path(folder) / "in")
                result = try_input(Path(folder) / "in" / seed.file, seed.hints, n)
            except Exception as e:
                result = signature(e)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({"result": result, "rss": rss}), file=report, flush=True)


def run_batch(reader: str, reader_seeds: list[Seed], first: int, count: int) -> Iterator[tuple[int, str, int]]:
    """Yield the number, result and peak memory (KiB) of each input.

    A child that hangs or dies ends the batch with that as a result.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
            with contextlib.suppress(BaseException):
                run_in_child(reader, reader_seeds, first, count, os.fdopen(write_end, "w"))
        os._exit(0)
    os.close(write_end)
    hang, closed = "", False
    started = finished = first - 1
    try:
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            rest = b""
            while not (hang or closed):
                if not select.select([pipe], [], [], SECONDS)[0]:
                    hang = f"hang: more than {SECONDS:g} s"
                elif not (piece := pipe.read(65536)):
                    closed = True
                else:
                    *lines, rest = (rest + piece).split(b"\n")
                    for event in map(json.loads, lines):
                        if "n" in event:
                            started = event["n"]
                        else:
                            finished = started
                            yield started, event["result"], event["rss"]
    finally:
        if not closed:  # the child hangs, or the caller wants no more of its results
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if started > finished or hang:
        yield started, hang or f"death: signal {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'none'}", 0


def try_seeds(reader_seeds: list[Seed]) -> None:
    """Try the seeds without a mutation, so that the parent has imported what reading them needs before it forks."""
    for seed in reader_seeds:
        with tempfile.TemporaryDirectory() as folder:
            write_files(seed.files, Path(folder) / "in")
            results = {try_input(Path(folder) / "in" / seed.file, seed.hints, n) for n in range(len(li.FORMATS))}
            assert results == {"read"}


def main() -> None:
    """Run the readers in turns until the time is over, and print a table of the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--only", nargs="*", help="readers")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each reader")
    parser.add_argument("--count", type=int, help="inputs of each reader, instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    all_seeds = seeds()
    readers = args.only or list(all_seeds)
    for reader in readers:
        try_seeds(all_seeds[reader])
    results: dict[str, Counter[str]] = {reader: Counter() for reader in readers}
    peak, number, seconds = (dict.fromkeys(readers, start) for start in (0, args.first, 0.0))
    findings: set[tuple[str, str]] = set()
    start = time.monotonic()

    def has_time_left() -> bool:
        if args.count is None:
            return time.monotonic() - start < args.minutes * 60
        return any(number[reader] < args.first + args.count for reader in readers)

    for reader in itertools.cycle(readers):
        if not has_time_left():
            break
        turn = time.monotonic()
        count = BATCH if args.count is None else min(BATCH, args.first + args.count - number[reader])
        for n, result, rss in run_batch(reader, all_seeds[reader], number[reader], count):
            kind = result if result in ("read", "refused") else "finding"
            results[reader][kind] += 1
            peak[reader], number[reader] = max(peak[reader], rss), n + 1
            if kind == "finding" and (reader, result) not in findings:
                findings.add((reader, result))
                print(f"FINDING {reader} {n}: {result}", flush=True)
                write_input(reader, n, all_seeds[reader], args.out / f"{reader}-{n}")
            if args.count is None and time.monotonic() - turn > TURN:
                break
        seconds[reader] += time.monotonic() - turn
    total, minutes = sum(c.total() for c in results.values()), (time.monotonic() - start) / 60
    print(f"{total:,} inputs in {minutes:.1f} minutes, {len(findings)} kinds of findings")
    print("| reader | inputs | read | refused | findings | seconds | MiB above the start, at most |")
    print("|---|---|---|---|---|---|---|")
    for reader, c in results.items():
        columns = [f"{n:,}" for n in (c.total(), c["read"], c["refused"], c["finding"])]
        columns += [f"{seconds[reader]:.0f}", f"{peak[reader] / 1024:.0f}"]
        print(f"| {reader} | {' | '.join(columns)} |")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
