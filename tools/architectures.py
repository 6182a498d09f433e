"""Check every architecture of the installed transformers under lorainject, and under PEFT.

    python tools/architectures.py llama --json         one type, as JSON
    python tools/architectures.py --all                every type, each in its own process; writes docs/architectures.md
    python tools/architectures.py --all --resume FILE  continues an interrupted run, whose rows are in FILE
    python tools/architectures.py --heads              counts the heads of all classes for tasks, and writes them there

The models are those of tests/support/zoo.py: tiny, with random weights. What is right is decided by a dense oracle
(dense_oracle.py), which shares nothing with the library. The report is made by architecture_report.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
import lorainject as li

import zoo
from architecture_report import report, with_heads
from dense_oracle import (
    CLOSE,
    EXACT,
    Inputs,
    Products,
    Wrong,
    adapted_sites,
    against_oracle,
    alive,
    apart,
    changed_tensors,
    clone,
    doubled,
    flat,
    gradients,
    observe,
    oracle,
    outputs,
    randomize,
)
from models import state

ROOT = Path(__file__).parent.parent


# --- our checks -------------------------------------------------------------------------------------------------------


def inject(model: nn.Module, without: list[str] | None = None) -> dict[str, Any]:
    """Inject into all linear layers, or into all convolutions if there are none. Return the columns of the report.

    What is refused by name is excluded, so that the rest can be checked.
    """
    columns: dict[str, Any] = {"targets": "all-linear", "excluded": list(without or [])}
    modules = {path for path, _ in model.named_modules() if path}
    for _ in range(5):
        try:
            plan = li.find(model, columns["targets"], r=4, init="gaussian", exclude=columns["excluded"])
            li.inject(model, columns["targets"], r=4, init="gaussian", exclude=columns["excluded"])
            return columns | {"left_out": dict(plan.left_out)}
        except li.LoraError as e:
            if columns["targets"] == "all-linear" and any(
                "matches nothing" in p or "leaves nothing" in p for p in e.problems
            ):
                columns |= {"targets": "all-conv", "excluded": []}
                continue
            named = [p.split(": ", 1)[0] for p in e.problems if ": " in p]
            named = [p if p in modules else p.rpartition(".")[0] for p in named]
            columns.setdefault("refused", _why(e))
            new = [p for p in dict.fromkeys(named) if p in modules and p not in columns["excluded"]]
            if not new:
                break
            columns["excluded"] += new
    raise Wrong(f"refused: {columns['refused']}")


def _why(e: Exception) -> str:
    """Return the first problem of an error without its path, so that equal reasons can be counted."""
    problems = getattr(e, "problems", ())
    text = problems[0].split(": ", 1)[-1] if problems else str(e).split("\n")[0]
    return " ".join(text.split())[:200]


def check_ours(base: nn.Module, inputs: Inputs, noise: float) -> dict[str, Any]:
    """Make all checks of lorainject. Return the columns of the report; `reason` names the first check that failed."""
    row: dict[str, Any] = {}
    model = clone(base)
    want = outputs(model, inputs)
    before = state(model)
    seen = observe(base, inputs)
    row["matmul"], row["conv"] = len(seen.matmul), len(seen.conv)
    try:
        row |= inject(model)
        sites = adapted_sites(model)
        row["sites"] = len(sites)
        row |= share(base, seen, [s.name for s in sites], set(row["left_out"]))
        if (d := apart(outputs(model, inputs), want)) > max(EXACT, 3 * noise):
            raise Wrong(f"law 1: the output right after inject is off by {d:.1g}")
        randomize(sites, base)
        row |= against_oracle(base, model, adapted_sites(model), inputs, noise)
        row |= check_probe(model, inputs, row)
        check_files(base, model, inputs, noise)
        row |= check_merge(base, model, inputs, noise, row["excluded"])
        li.eject(model)
        after = state(model)
        if changed := [p for p in {**before, **after} if before.get(p) != after.get(p)]:
            raise Wrong(f"eject: {changed[0] or 'the model'} is not as before")
        row["half"] = check_half(base)
    except Wrong as e:
        row["reason"] = str(e)
    except li.LoraError as e:
        row["reason"] = f"refused: {_why(e)}"
    except Exception as e:
        row["reason"] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    row["verdict"] = verdict(row)
    return row


def verdict(row: Mapping[str, Any]) -> str:
    """Return "ok", "refused" (all or some layers), "unreached", "wrong", or "error" for an unhelpful exception."""
    reason = row.get("reason", "")
    if re.match(r"\w+(Error|Exception): ", reason):
        return "error"
    if reason:
        return "refused" if reason.startswith("refused") else "unreached" if "UNREACHED" in reason else "wrong"
    return "refused" if row.get("refused") else "ok"


def share(base: nn.Module, seen: Products, adapted: list[str], left_out: set[str]) -> dict[str, Any]:
    """Return how much of the parameters in matrix products is adapted, without and with the heads and routers that
    lorainject leaves out by design."""
    canonical = {id(p): n for n, p in base.named_parameters()}
    size = {n: p.numel() for n, p in base.named_parameters()}
    every = list(base.named_parameters(remove_duplicate=False))
    ours = {canonical[id(p)] for n, p in every if n in set(adapted)}
    # A tied head goes by the name of the embedding.
    design = {canonical[id(p)] for n, p in every if n.rpartition(".")[0] in left_out} - ours

    def part(names: set[str]) -> float | None:
        total = sum(size[n] for n in names)
        return round(sum(size[n] for n in names & ours) / total, 4) if total else None

    missed = sorted(seen.matmul - design - ours, key=lambda n: -size[n])
    return {
        "share": part(seen.matmul - design),
        "share_all": part(seen.matmul),
        "share_conv": part(seen.conv),
        "missed": missed[:4],
    }


def check_probe(model: nn.Module, inputs: Inputs, row: Mapping[str, Any]) -> dict[str, Any]:
    """Check that probe complains only of weights that are dead in the oracle."""
    try:
        torch.manual_seed(0)
        li.probe(model, **copy.deepcopy(dict(inputs)))
        return {}
    except li.UnreachedAdapter as e:
        bypassed = [p for p in e.problems if "without the layer being called" in p]
        if bypassed or len(e.problems) > row["dead"]:
            raise Wrong(
                f"probe complains of {len(e.problems)} sites, the oracle of {row['dead']}: {e.problems[0][:120]}"
            ) from None
        return {"probe": len(e.problems)}
    except li.StateError as e:
        if "autograd function" in str(e):  # Reformer's reversible layers
            return {}
        raise


def check_merge(base: nn.Module, model: nn.Module, inputs: Inputs, noise: float, excluded: list[str]) -> dict[str, Any]:
    """Check that merge keeps the outputs and writes the oracle's weights, and that unmerge restores W0.

    Tied weights, whose merge is refused, are left out.
    """
    want, deltas = outputs(model, inputs), [(s.paths, s.parameter, s.delta().detach()) for s in adapted_sites(model)]
    first = {n: t.clone() for n, t in flat(model).items()}
    close = max(CLOSE, 3 * noise)
    try:
        li.merge(model)
    except li.MergeError as e:
        tied = [p.split(": ", 1)[0] for p in e.problems if "tied" in p]
        if len(tied) != len(e.problems) or not set(tied).isdisjoint(excluded):
            raise Wrong(f"merge refused: {_why(e)}") from None
        rest = clone(base)
        inject(rest, [*excluded, *tied])
        randomize(adapted_sites(rest), base)
        return check_merge(base, rest, inputs, noise, [*excluded, *tied]) | {"tied": len(tied)}
    got = outputs(model, inputs)
    dense, _ = oracle(base, deltas)
    d = min(apart(got, want), apart(got, outputs(dense, inputs)))
    if d > close and not _merges_in_float64(model, inputs):
        raise Wrong(f"merged output differs by {d:.1g}")
    for (path, *_), parameter, _ in deltas:
        W, D = (m.get_submodule(path)._parameters[parameter].detach() for m in (model, dense))
        if (d := apart([W], [D])) > EXACT:
            raise Wrong(f"merged weight {path} differs from W0 + s B A by {d:.1g}")
    li.unmerge(model)
    if changed := changed_tensors(first, flat(model)):
        raise Wrong(f"unmerge: {changed[0]} is not back to the bit")
    if (d := apart(outputs(model, inputs), want)) > max(EXACT, 3 * noise):
        raise Wrong(f"the output after unmerge differs by {d:.1g}")
    return {"exact": True}


def _merges_in_float64(model: nn.Module, inputs: Inputs) -> bool:
    """True if merging keeps the outputs in float64. In float32 some bases (swinv2, vits) differ by 2e-5 from themselves
    in float64."""
    wide = clone(model)
    li.unmerge(wide)
    wide.double()
    try:
        want = outputs(wide, doubled(inputs))
    except Exception:  # many models need float32 somewhere
        return False
    li.merge(wide)
    return apart(outputs(wide, doubled(inputs)), want) <= 1e-8


def check_half(base: nn.Module) -> str:
    """Check that merge and unmerge in bfloat16 restore every bit. Return "ok", or "refused"."""
    model = clone(base).bfloat16()
    inject(model)
    randomize(adapted_sites(model), model)
    first = {n: t.clone() for n, t in flat(model).items()}
    try:
        li.merge(model)
    except li.MergeError:
        return "refused"
    li.unmerge(model)
    if changed := changed_tensors(first, flat(model)):
        raise Wrong(f"bfloat16: after unmerge {changed[0]} is not back to the bit")
    return "ok"


def check_files(base: nn.Module, model: nn.Module, inputs: Inputs, noise: float) -> None:
    """Check that a saved adapter, loaded onto a fresh base, gives the same outputs."""
    want = outputs(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        li.save(model, Path(folder) / "adapter.safetensors")
        fresh = li.load(clone(base), Path(folder) / "adapter.safetensors")
        if (d := apart(outputs(fresh, inputs), want)) > max(EXACT, 3 * noise):
            raise Wrong(f"loaded: the output differs by {d:.1g}")


# --- PEFT's -----------------------------------------------------------------------------------------------------------


def check_peft(base: nn.Module, inputs: Inputs, noise: float, left_out: set[str]) -> dict[str, Any]:
    """Make the same checks of PEFT with target_modules="all-linear", as far as it has these functions."""
    import peft
    from peft.tuners.lora import LoraLayer

    row: dict[str, Any] = {}
    seen = observe(base, inputs)
    want = outputs(base, inputs)

    def adapted() -> tuple[nn.Module, dict[tuple[str, str], LoraLayer]]:
        torch.manual_seed(5)
        model = peft.get_peft_model(clone(base), peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")).eval()
        layers = {}
        for path, m in model.base_model.model.named_modules():
            if isinstance(m, LoraLayer):  # one around another where a module has several parameters
                layers[path.removesuffix(".base_layer"), getattr(m, "parameter_name", "weight")] = m
        return model, layers

    try:
        model, layers = adapted()
        row["sites"] = len(layers)
        row |= share(base, seen, [".".join(place) for place in layers], left_out)
        if (d := apart(outputs(model, inputs), want)) > max(EXACT, 3 * noise):
            raise Wrong(f"the output right after get_peft_model is off by {d:.1g}")
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for (path, parameter), layer in layers.items():
                std = float(base.get_submodule(path)._parameters[parameter].float().std())
                for factor, size in ((layer.lora_A, 0.5), (layer.lora_B, 0.2 * std or 0.02)):
                    factor["default"].weight.copy_(torch.randn(factor["default"].weight.shape, generator=g) * size)
        dense, weights = oracle(
            base, [((path,), name, layer.get_delta_weight("default")) for (path, name), layer in layers.items()]
        )
        expected, by_weight = gradients(dense, inputs, weights)
        got, by_B = gradients(model, inputs, [layer.lora_B["default"].weight for layer in layers.values()])
        unreached = [
            ".".join(place) for place, w, b in zip(layers, by_weight, by_B, strict=True) if alive(w) and not alive(b)
        ]
        row["dead"] = sum(not alive(w) for w in by_weight)
        if unreached:
            raise Wrong(f"SILENTLY UNREACHED: {len(unreached)} sites, as {unreached[0]}")
        if (d := apart(got, expected)) > max(10 * CLOSE, 3 * noise):
            raise Wrong(f"output differs from the dense oracle's by {d:.1g}")
        fresh, _ = adapted()
        peft.set_peft_model_state_dict(fresh, copy.deepcopy(peft.get_peft_model_state_dict(model)))
        if (d := apart(outputs(fresh, inputs), got)) > max(EXACT, 3 * noise):
            raise Wrong(f"loaded: the output differs by {d:.1g}")
        first = {place: getattr(layer.get_base_layer(), place[1]).detach().clone() for place, layer in layers.items()}
        model.merge_adapter()
        merged = apart(outputs(model, inputs), got)
        model.unmerge_adapter()
        row["exact"] = all(
            torch.equal(first[place], getattr(layer.get_base_layer(), place[1])) for place, layer in layers.items()
        )
        if merged > max(10 * CLOSE, 3 * noise):
            raise Wrong(f"merged output differs by {merged:.1g}")
    except Wrong as e:
        row["reason"] = str(e)
    except Exception as e:
        row["reason"] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    row["verdict"] = verdict(row)
    return row


# --- heads ------------------------------------------------------------------------------------------------------------


def task_heads(model_type: str) -> dict[str, dict[str, str]]:
    """Return what all-linear leaves out in each class for a task that a type has; the models are built on meta."""
    heads = {}
    for cls in zoo.task_classes(model_type) if ":" not in model_type else ():
        for _, _, config in zoo.configs(f"{model_type}:{cls.__name__}"):
            try:
                with torch.device("meta"):
                    model = cls(copy.deepcopy(config))
                model.tie_weights()
                heads[cls.__name__] = dict(li.find(model, "all-linear").left_out)
                break
            except li.LoraError:  # all that multiplies is the head
                break
            except Exception:  # the next config may be one that this class takes
                continue
    return heads


# --- one type ---------------------------------------------------------------------------------------------------------


def examine(model_type: str, peft: bool = True) -> dict[str, Any]:
    """Check one model type. Return the row of the report, which can be written as JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    row: dict[str, Any] = {"type": model_type}
    try:
        base = zoo.build(model_type)
    except zoo.NoModel as e:
        return row | {"verdict": "not built", "reason": str(e)}
    inputs = zoo.inputs(base)
    row |= {
        "class": type(base).__name__,
        "parameters": sum(p.numel() for p in base.parameters()),
        "inputs": sorted(inputs),
    }
    first = outputs(base, inputs)
    row["noise"] = noise = apart(outputs(base, inputs), first)
    row["ours"] = check_ours(base, inputs, noise)
    row["heads"] = task_heads(model_type)
    if peft:
        row["peft"] = check_peft(base, inputs, noise, set(row["ours"].get("left_out", ())))
    return row | {"verdict": row["ours"]["verdict"], "seconds": round(time.monotonic() - start, 1)}


# --- all of them ------------------------------------------------------------------------------------------------------


def _child(model_type: str, out: Any, memory: int) -> None:
    """Check one type in a separate process, so that no crash or lack of memory reaches the others."""
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 1)
        os.dup2(devnull.fileno(), 2)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError):
        pass
    try:
        out.send(examine(model_type))
    except BaseException as e:
        out.send(
            {"type": model_type, "verdict": "error", "reason": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
        )


def examine_all(names: Iterable[str], jobs: int, seconds: float, record: Callable[[dict[str, Any]], None]) -> None:
    """Check every type in a fresh process with 12 GiB of addresses, `jobs` at a time, each for at most `seconds`."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(
            ["torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "lorainject"]
        )
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, send, 12 << 30), daemon=True)
            process.start()
            send.close()
            running[receive] = (name, process, time.monotonic() + seconds)
        ready = multiprocessing.connection.wait(list(running), timeout=1)
        for receive, (name, process, deadline) in list(running.items()):
            row = None
            if receive in ready:
                try:
                    row = receive.recv()
                except EOFError:
                    row = {"type": name, "verdict": "error", "reason": "the process died (out of memory?)"}
            elif time.monotonic() > deadline:
                row = {"type": name, "verdict": "error", "reason": f"took more than {seconds:g} s"}
            if row is not None:
                process.kill()
                process.join()
                receive.close()
                del running[receive]
                record(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*", help="model types, such as llama")
    parser.add_argument("--json", action="store_true", help="print one JSON object per type")
    parser.add_argument("--all", action="store_true", help="every type, and write the report")
    parser.add_argument("--only", default="", help="with --all: these types alone, separated by commas")
    parser.add_argument("--heads", action="store_true", help="write anew which heads are left out: a few minutes")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seconds", type=float, default=180, help="time limit for one type")
    parser.add_argument(
        "--resume", type=Path, help="JSON lines: read what is done, append what is new (default: a temporary file)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet()
    if args.heads:
        heads = {cls: left_out for name in zoo.types() for cls, left_out in task_heads(name).items()}
        args.out.write_text(with_heads(args.out.read_text(), heads))
        return
    if not args.all and not args.types:
        parser.error("name model types, or --all")
    if not args.all:
        for name in args.types:
            row = examine(name)
            print(json.dumps(row) if args.json else json.dumps(row, indent=2))
        return
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    path = args.resume or Path(tempfile.gettempdir()) / "architectures.jsonl"
    lines = path.read_text().splitlines() if args.resume and path.exists() else []
    done = {
        row["type"]: row for row in (json.loads(line) for line in lines if line.endswith("}"))
    }  # the last may be torn
    wanted = args.only.split(",") if args.only else zoo.types()
    with (
        path.open("a" if done else "w") as file,
        Progress(
            *Progress.get_default_columns(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}"),
        ) as progress,
    ):
        task = progress.add_task("architectures", total=len(wanted), completed=sum(n in done for n in wanted), last="")

        def record(row: dict[str, Any]) -> None:
            done[row["type"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.update(task, advance=1, last=f"{row['type']}: {row['verdict']}")

        examine_all([n for n in wanted if n not in done], args.jobs, args.seconds, record)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(
        report([done[n] for n in wanted], "scripts/architectures" + (f" --only {args.only}" if args.only else ""))
    )
    print(f"{args.out} written; one JSON object a type in {path}")


def quiet() -> None:
    """No advice from transformers about configs that are made small on purpose."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
