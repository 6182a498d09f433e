"""Claims of the paper that follow from arithmetic: on configs, on the meta device, without weights or data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lorainject as li
from lorainject import analysis

from .adapter_layers import add_adapter_layers
from .reference import TABLE_7_NORM, TABLE_7_RANDOM

VIEWS = ("view", "reshape", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split", "t",
         "detach", "alias", "as_strided", "unbind", "_unsafe_view", "chunk")  # fmt: skip


class Claim(NamedTuple):
    """A claim of the paper beside what is computed here."""

    claim: str
    paper: str
    ours: str
    verdict: str


def parameter_claims() -> list[Claim]:
    """Return the claims about numbers of trained parameters."""
    roberta = {size: analysis.parameter_budget(_roberta(size))["LoRA"] for size in ("base", "large")}
    xxl = {r: analysis.parameter_budget(_deberta(), r)["LoRA"] for r in (8, 16)}
    gpt2 = {n: analysis.parameter_budget(_gpt2(*sizes), 4, bottleneck=224) for n, sizes in GPT2.items()}
    counts = {r: analysis.parameter_budget(_gpt2(12288, 96, 96), r, bottleneck=r) for r in (1, 4, 8)}
    four = analysis.parameter_budget(_gpt2(12288, 96, 96), 2, ["query", "key", "value", "output"])["LoRA"]
    gpt3, whole = {r: budget["LoRA"] for r, budget in counts.items()}, counts[8]["FT"]
    qv = "q and v"
    rows = [
        (f"RoBERTa base and large, {qv}, r = 8", "0.3M, 0.8M", _both(roberta.values()), "holds, without the head"),
        (f"DeBERTa XXL, {qv}, r = 8 (table 10)", "4.7M", f"{xxl[8]:,}; with r = 16 {xxl[16]:,}", "a slip: r is 16"),
        (f"GPT-2 medium and large, {qv}, r = 4", "0.35M, 0.77M", _both(b["LoRA"] for b in gpt2.values()), "is off"),
        ("GPT-2 medium, last two blocks", "25.19M", f"{gpt2['medium']['FT-top2']:,}", "holds"),
        ("GPT-2 medium, Adapter L", "11.09M", f"{gpt2['medium']['Adapter L']:,} with m = 224", "holds"),
        (f"GPT-3, {qv}, r = 1, 4, 8", "4.7M, 18.8M, 37.7M", _both(gpt3.values()), "holds"),
        ("GPT-3, q, k, v and o, r = 2 (E.4)", "37.7M", f"{four:,}", "a slip: twice the number"),
        ("GPT-3, PreEmbed with 256 + 8 vectors", "3.2M", f"{counts[1]['PreEmbed']:,}", "holds"),
        ("GPT-3, Adapter H, m = 1, 8", "7.1M, 40.1M", _both(counts[m]["Adapter H"] for m in (1, 8)), "holds"),
        ("GPT-3 checkpoint, r = 4", "350 GB to 35 MB, 10,000 x", _checkpoint(gpt3[4], whole), "holds"),
        ("GPT-3 memory in training", "1.2 TB to 350 GB", _memory(whole), "two thirds are saved"),
        ("Throughput, 32.5 to 43.1 tokens/s", "25 % faster",
         f"+{43.1 / 32.5 - 1:.1%} throughput, {32.5 / 43.1 - 1:.1%} time", "a matter of words"),
    ]  # fmt: skip
    return [Claim(*row) for row in rows]


def _checkpoint(trained: int, whole: int) -> str:
    return f"{2 * trained / 1e6:.1f} MB = {2 * trained / 2**20:.1f} MiB of 16-bit values, {whole / trained:,.0f} x"


def _memory(whole: int) -> str:
    return f"16-bit weights {2 * whole / 1e9:.1f} GB; with Adam {6 * whole / 1e9:,.0f} GB"


def random_baseline_claim() -> Claim:
    """Return the claim of table 7's random column, by the formula |W| r / d."""
    ours = {r: TABLE_7_NORM * r / 12288 for r in TABLE_7_RANDOM}
    return Claim("Table 7, random column, r = 4 and 64", ", ".join(map(str, TABLE_7_RANDOM.values())),
                 ", ".join(f"{x:.4f}" for x in ours.values()), "holds, by formula")  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that compute or copy, which are the kernels that a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def latency_rows() -> list[tuple[str, int, float]]:
    """Return (way, operators, FLOPs) of a forward of 1 x 128 tokens through GPT-2 medium, by way of adapting."""
    rows = []
    for way in ("base", "LoRA r=4, merged", "LoRA r=4, unmerged", "Adapter L m=224", "Adapter H m=112"):
        model = _gpt2(*GPT2["medium"])
        if "LoRA" in way:
            li.inject(model, ["query", "value"], r=4)
        if "merged" in way and "un" not in way:
            li.eject(model)  # what a merged model computes: its classes are the base's
        if "Adapter" in way:
            add_adapter_layers(model, way.split()[1], int(way.rpartition("=")[2]))
        with torch.no_grad(), FlopCounterMode(display=False) as flops, Operators() as operators:
            _forward(model)
        rows.append((way, operators.count, float(flops.get_total_flops())))
    return rows


def training_flops() -> list[Claim]:
    """Return the FLOPs of a training step beside those of full fine-tuning, on GPT-2 medium's shape."""
    counts = {}
    settings = {"q, v, r = 8": (["query", "value"], 8), "all-linear, r = 16": (["all-linear"], 16),
                "q, v, r = 256": (["query", "value"], 256)}  # fmt: skip
    for name, setting in {"full": None, **settings}.items():
        model = _gpt2(*GPT2["medium"])
        if setting is not None:
            li.inject(model, setting[0], r=setting[1])
        with FlopCounterMode(display=False) as flops:
            _forward(model).sum().backward()
        counts[name] = float(flops.get_total_flops())
    return [Claim(f"FLOPs of a training step, {name}", "about 2/3 of full fine-tuning",
                  f"{counts[name] / counts['full']:.3f}",
                  "about 2/3" if counts[name] < 0.7 * counts["full"] else "more")
            for name in settings]  # fmt: skip


GPT2 = {"medium": (1024, 24, 16), "large": (1280, 36, 20)}


def _forward(model: nn.Module, length: int = 128) -> torch.Tensor:
    """Return the hidden states of one text. The mask is 4-D: of a shorter one, the model reads values."""
    with torch.device("meta"):
        ids, mask = torch.zeros(1, length, dtype=torch.long), torch.zeros(1, 1, length, length)
    states: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return states


def _gpt2(width: int, depth: int, heads: int) -> Any:
    return _on_meta("GPT2", n_embd=width, n_layer=depth, n_head=heads, n_positions=2048 if depth == 96 else 1024)


def _roberta(size: str) -> nn.Module:
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    settings = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return _on_meta("Roberta", **settings, **(large if size == "large" else {}))


def _deberta() -> nn.Module:
    return _on_meta("DebertaV2", vocab_size=128100, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24,
                    intermediate_size=6144, type_vocab_size=0, relative_attention=True, position_biased_input=False,
                    pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm", conv_kernel_size=3,
                    position_buckets=256)  # fmt: skip


def _on_meta(name: str, **config: Any) -> Any:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))


def _both(numbers: Any) -> str:
    return ", ".join(f"{n:,}" for n in numbers)
