"""Every reader against mutations of real files (mutations.py): `scripts/fuzz [--minutes N] [--only READER] [--first N]`.

Each input is read, and what can be read is surveyed, written in our own format and in another, and read back. It must end in time, within
MEMORY more than the process began with, and raise nothing but LoraError. A child process does it, under RLIMIT_AS; the parent kills it when
an input takes longer than SECONDS, and begins a new one after whatever kills it. An input is known by its reader and number, which make it
again: `--only READER --first N --count 1`. What is found is written to --out, one folder for each kind.
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
from typing import Any

import torch
from safetensors.torch import load_file

import lorainject as li
from lorainject.files.describe import survey
from lorainject.files.io.open_adapter import CONFIGS, FILES

from mutations import mutated
from oracle import FIXTURES, tree

SECONDS = 10.0  # for one input
MEMORY = 2**31  # bytes of address space beyond what the process begins with
BATCH = 3000  # inputs of one child process
LINEARS = {
    f"model.layers.{i}.{at}.weight": shape
    for i in range(2)
    for at, shape in (("self_attn.q_proj", (16, 8)), ("self_attn.k_proj", (8, 8)), ("mlp.up_proj", (12, 8)))
}


@dataclass
class Seed:
    """A real file or directory to begin with."""

    files: dict[str, bytes]
    file: str = ""
    """Which of them is given to read; empty for the directory."""
    hints: li.Hints = field(default_factory=li.Hints)


def folder(at: Path, **told: Any) -> Seed:
    return Seed(
        {p.name: p.read_bytes() for p in sorted(at.iterdir()) if p.name in (*FILES, *CONFIGS)}, hints=li.Hints(**told)
    )


def single(at: Path, **told: Any) -> Seed:
    return Seed({at.name: at.read_bytes()}, at.name, li.Hints(**told))


def seeds() -> dict[str, list[Seed]]:
    """By reader, from the fixtures; of containers that no fixture has, one made of them."""
    peft = [
        folder(FIXTURES / f"peft_{v}")
        for v in ("plain", "dora", "lora_bias", "bias_all", "bias_lora_only", "tokens", "params")
    ]
    peft += [folder(p) for p in sorted((FIXTURES / "peft_target_parameters").glob("*/*_ad"))]
    base = load_file(FIXTURES / "kohya_lycoris" / "base.safetensors")
    names = tree({key: tuple(t.shape) for key, t in base.items()})
    groups = {"m101": [True, False, True], "m111": [True] * 3, "mf": [True, False, True]}
    with tempfile.TemporaryDirectory() as at:
        natives = [_native(Path(at), v) for v in ("plain", "dora", "tokens", "params", "bias_all")]
        llama = li.inject(tree(LINEARS), ["q_proj", "re:.*k_proj"], r=2)
        natives += [folder(li.save(llama, Path(at) / "llama")), single(li.save(llama, Path(at) / "llama.safetensors"))]
    return {
        "lorainject": natives, "peft": peft, "tar": [_tar(peft[0], "w"), _tar(peft[1], "w:gz")],
        "kohya": [single(FIXTURES / "kohya_lycoris" / "lora.safetensors"), single(FIXTURES / "kohya_lycoris" / "lora.safetensors", component="unet", model=names),
                  single(FIXTURES / "diffusers" / "kohya.safetensors")],
        "diffusers": [folder(FIXTURES / "diffusers"), single(FIXTURES / "diffusers" / "no_header.safetensors"), single(FIXTURES / "diffusers" / "pytorch_lora_weights.safetensors", component="unet")],
        "mlx": [folder(FIXTURES / "mlx_lora"), _npz(FIXTURES / "mlx_lora")],
        "gguf": [single(FIXTURES / "gguf" / "lora.gguf", heads=(4, 2)), single(FIXTURES / "gguf" / "lora.gguf", heads=(4, 2), model=tree(LINEARS))],
        "torchtune": [folder(FIXTURES / "torchtune", alpha=6, heads=(4, 2)), single(FIXTURES / "torchtune" / "adapter_model.pt", alpha=6, heads=(4, 2))],
        "litgpt": [folder(FIXTURES / "litgpt", heads=(4, 2)), folder(FIXTURES / "litgpt")],
        "loralib": [single(FIXTURES / "loralib" / f"{n}.pt", alpha=6, groups=groups) for n in ("lora", "lora_bias", "full_train_mode")],
        "adapterhub": [folder(FIXTURES / f"adapterhub_{n}") for n in ("bert", "gpt2")],
        "onnx": [single(FIXTURES / "onnx_adapter" / "a.onnx_adapter")],
    }  # fmt: skip


def _native(at: Path, variant: str) -> Seed:
    li.write(li.read(FIXTURES / f"peft_{variant}"), at / variant)
    return folder(at / variant)


def _tar(seed: Seed, mode: Any) -> Seed:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in seed.files.items():
            about = tarfile.TarInfo(f"adapter/{name}")
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return Seed({"a.tar": out.getvalue()}, "a.tar")


def _npz(at: Path) -> Seed:
    import numpy

    out = io.BytesIO()
    numpy.savez(out, **{key: t.float().numpy() for key, t in load_file(at / "adapters.safetensors").items()})
    return Seed({"adapters.npz": out.getvalue(), "adapter_config.json": (at / "adapter_config.json").read_bytes()})


def made(reader: str, n: int, of: list[Seed]) -> tuple[Seed, dict[str, bytes]]:
    """Input n of a reader."""
    rng = random.Random(f"{reader} {n}")
    seed = rng.choice(of)
    return seed, mutated(seed.files, rng)


def tried(at: Path, hints: li.Hints, n: int) -> str:
    """Read it, and do with it what one does with a file. "read" or "refused"; whatever else is raised is a finding."""
    try:
        file = li.read(at, allow_pickle=True, hints=hints)
        json.dumps(survey(file))
    except li.LoraError as e:
        _within(e)
        return "refused"
    out = at.parent / "out"
    for format in ("lorainject", list(li.FORMATS)[n % len(li.FORMATS)]):
        form = li.FORMATS[format]
        told = replace(hints, heads=(4, 2), architecture="llama", component=hints.component or "unet")
        try:
            done = li.write(file, out / f"{format}{form.suffix}", format=format, lossy=n % 2 == 0, hints=told)
            li.read(done.path, allow_pickle=True, hints=replace(told, alpha=1.0))
        except li.LoraError as e:
            _within(e)
    return "read"


def _within(e: BaseException | None) -> None:
    """An allocation that failed is none that a reader may hide."""
    while e is not None:
        if isinstance(e, MemoryError) or "can't allocate memory" in str(e):
            raise MemoryError(str(e)) from e
        e = e.__cause__ or e.__context__


def signature(e: BaseException) -> str:
    """What is raised, and where in our code."""
    own = [f for f in traceback.extract_tb(e.__traceback__) if "/lorainject/" in f.filename]
    where = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "outside"
    return f"{type(e).__name__} in {where}: {str(e).splitlines()[0][:100] if str(e) else ''}"


def work(reader: str, of: list[Seed], numbers: Iterator[int], say: Any) -> None:
    """In the child: one input after another, each told before it is tried, and how it ended."""
    torch.set_num_threads(1)  # a child has none of its parent's threads, and would wait for them
    started = _pages()
    resource.setrlimit(resource.RLIMIT_AS, (started + MEMORY, started + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    warnings.simplefilter("ignore")
    for n in numbers:
        seed, files = made(reader, n, of)
        with tempfile.TemporaryDirectory(dir=os.environ.get("FUZZ_TMP")) as at:
            place = Path(at) / "in"
            put(files, place)
            print(json.dumps({"n": n}), file=say, flush=True)
            try:
                end = tried(place / seed.file, seed.hints, n)
            except Exception as e:
                end = signature(e)
        print(
            json.dumps({"end": end, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before}),
            file=say,
            flush=True,
        )


def _pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def put(files: dict[str, bytes], place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (place / name).write_bytes(data)


def batch(reader: str, of: list[Seed], first: int, count: int) -> Iterator[tuple[int, str, int]]:
    """Number, end and peak memory of each input; a child that hangs or dies is an end too, and the last of its batch."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
            with contextlib.suppress(BaseException):
                work(reader, of, iter(range(first, first + count)), os.fdopen(write, "w"))
        os._exit(0)
    os.close(write)
    n, why, over = first, "", False
    begun = done = first - 1
    try:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            rest = b""
            while not (why or over):
                if not select.select([pipe], [], [], SECONDS)[0]:
                    why = f"hang: more than {SECONDS:g} s"
                elif not (piece := pipe.read(65536)):
                    over = True
                else:
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        told = json.loads(line)
                        if "n" in told:
                            n = begun = told["n"]
                        else:
                            done = n
                            yield n, told["end"], told["rss"]
    finally:
        if not over:  # it hangs, or is not needed any more
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if begun > done or why:
        yield begun, why or f"death: signal {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'none'}", 0


def warm(of: list[Seed]) -> None:
    """The seeds as they are: what reading them imports, is imported once and not in each child."""
    for seed in of:
        with tempfile.TemporaryDirectory() as at:
            put(seed.files, Path(at) / "in")
            assert {tried(Path(at) / "in" / seed.file, seed.hints, n) for n in range(len(li.FORMATS))} == {"read"}


def main() -> None:
    """Reader after reader, in turns, until the time is over."""
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--minutes", type=float, default=5)
    args.add_argument("--only", nargs="*", help="readers")
    args.add_argument("--first", type=int, default=0, help="number of the first input of each reader")
    args.add_argument("--count", type=int, help="inputs of each reader, instead of minutes")
    args.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    given = args.parse_args()
    torch.set_num_threads(1)
    known = seeds()
    readers = given.only or list(known)
    for reader in readers:
        warm(known[reader])
    ends: dict[str, Counter[str]] = {reader: Counter() for reader in readers}
    peak, number, start, found = dict.fromkeys(readers, 0), dict.fromkeys(readers, given.first), time.monotonic(), {}
    spent = dict.fromkeys(readers, 0.0)

    def left() -> bool:
        return (
            (time.monotonic() - start < given.minutes * 60)
            if given.count is None
            else any(number[r] < given.first + given.count for r in readers)
        )

    for reader in itertools.cycle(readers):
        if not left():
            break
        begun, count = (
            time.monotonic(),
            BATCH if given.count is None else min(BATCH, given.first + given.count - number[reader]),
        )
        for n, end, rss in batch(reader, known[reader], number[reader], count):
            kind = end if end in ("read", "refused") else "found"
            ends[reader][kind] += 1
            peak[reader], number[reader] = max(peak[reader], rss), n + 1
            if kind == "found" and (reader, end) not in found:
                found[reader, end] = n
                print(f"FOUND {reader} {n}: {end}", flush=True)
                put(made(reader, n, known[reader])[1], given.out / f"{reader}-{n}")
            if given.count is None and time.monotonic() - begun > 20:
                break
        spent[reader] += time.monotonic() - begun
    print(
        f"{sum(c.total() for c in ends.values()):,} inputs in {(time.monotonic() - start) / 60:.1f} minutes, {len(found)} kinds of findings"
    )
    print(
        "| reader | inputs | read | refused | found | seconds | MiB above the start, at most |\n|---|---|---|---|---|---|---|"
    )
    for reader, c in ends.items():
        print(
            f"| {reader} | {c.total():,} | {c['read']:,} | {c['refused']:,} | {c['found']:,} | {spent[reader]:.0f} | {peak[reader] / 1024:.0f} |"
        )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
