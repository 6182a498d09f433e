"""Parameter budgets: the table of the LoRA paper, computed from configs on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject import analysis

from models import TINY, gpt2, llama, t5


def on_meta(name: str, **config: object) -> nn.Module:
    """Return the model of a config on the meta device."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))


def roberta(size: str) -> nn.Module:
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return on_meta("Roberta", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
                   **(large if size == "large" else {}))  # fmt: skip


def gpt(width: int, depth: int, heads: int) -> nn.Module:
    return on_meta("GPT2", n_embd=width, n_layer=depth, n_head=heads, n_positions=2048 if depth == 96 else 1024)


def deberta_xxl() -> nn.Module:
    return on_meta("DebertaV2", vocab_size=128100, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24,
                   intermediate_size=6144, type_vocab_size=0, relative_attention=True, position_biased_input=False,
                   pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm", conv_kernel_size=3,
                   position_buckets=256)  # fmt: skip


def test_table_2_of_the_paper():
    """RoBERTa and DeBERTa: LoRA 0.3M and 0.8M, BitFit 0.1M, adapters 0.8M; DeBERTa's 4.7M needs r = 16, not 8."""
    base = analysis.parameter_budget(roberta("base"))
    assert base["LoRA"] == 294_912  # 0.3M
    assert round(base["FT"] / 1e6) == 125
    assert round(base["BitFit"] / 1e6, 1) == 0.1
    large = analysis.parameter_budget(roberta("large"), bottleneck=8)
    assert large["LoRA"] == 786_432  # 0.8M
    assert round(large["FT"] / 1e6) == 355
    assert round(large["Adapter H"] / 1e6, 1) == 0.8
    assert round(analysis.parameter_budget(roberta("large"), bottleneck=16)["Adapter P"] / 1e6, 1) == 0.8
    xxl = deberta_xxl()
    assert analysis.parameter_budget(xxl)["LoRA"] == 2_359_296  # the rank of table 10
    assert analysis.parameter_budget(xxl, 16)["LoRA"] == 4_718_592  # 4.7M, the rank of the paper's script


def test_table_3_of_the_paper():
    """GPT-2: FT 354.92M, FT-top2 25.19M and Adapter L 11.09M hold; LoRA's 0.35M and 0.77M are 0.39M and 0.74M."""
    medium = analysis.parameter_budget(gpt(1024, 24, 16), 4, ["c_attn[q,v]"], bottleneck=224)
    assert medium["LoRA"] == 393_216
    assert round(medium["FT"] / 1e6, 2) == 354.82  # the tied head counts once
    assert round(medium["FT-top2"] / 1e6, 2) == 25.19
    assert round(medium["Adapter L"] / 1e6, 2) == 11.09
    large = analysis.parameter_budget(gpt(1280, 36, 20), 4, ["c_attn[q,v]"])
    assert large["LoRA"] == 737_280


def test_table_4_of_the_paper():
    """GPT-3 175B: LoRA 4.7M, 18.8M and 37.7M, PreEmbed 3.2M, Adapter H 7.1M and 40.1M, on the meta device."""
    model = gpt(12288, 96, 96)
    counts = {r: analysis.parameter_budget(model, r, bottleneck=r) for r in (1, 8)}
    assert [b["LoRA"] for b in counts.values()] == [4_718_592, 37_748_736]
    assert analysis.parameter_budget(model, 4)["LoRA"] == 18_874_368
    assert round(counts[1]["PreEmbed"] / 1e6, 1) == 3.2
    assert [round(b["Adapter H"] / 1e6, 1) for b in counts.values()] == [7.1, 40.1]
    four = analysis.parameter_budget(model, 2, ["query", "key", "value", "output"])
    assert four["LoRA"] == 18_874_368  # appendix E.4 says 37.7M


def test_budget_counts_what_would_train():
    """FT, FT-top2, BitFit and LoRA are the numbers of parameters that these ways of training leave trainable."""
    model = gpt2()
    budget = analysis.parameter_budget(model, 4, prefix=3, infix=2)
    assert budget["FT"] == sum(p.numel() for p in model.parameters())
    assert budget["FT-top2"] == sum(p.numel() for p in model.transformer.h[-2:].parameters())
    assert budget["BitFit"] == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert budget["PreEmbed"] == 32 * 5
    assert budget["PreLayer"] == 2 * 32 * 5
    assert budget["LoRA"] == sum(p.numel() for p in li.parameters(li.inject(model, ["query", "value"], r=4)))


@pytest.mark.parametrize("name", TINY)
def test_budget_of_any_architecture(name):
    """Every tiny model has a budget, with its blocks and its width."""
    model = TINY[name].build()
    budget = analysis.parameter_budget(model, 2, ["all-linear"])
    assert all(width == 32 for _, _, width in budget.blocks) or name in ("whisper", "vit")
    assert budget["FT-top2"] < budget["FT"] == budget.total
    assert str(budget).count("\n") == len(budget.rows) + 1
    assert budget.as_json()["rows"][0]["method"] == "FT"


def test_stacks_of_an_encoder_and_a_decoder():
    """All blocks count; the last two are those of the larger stack."""
    model = t5()
    budget = analysis.parameter_budget(model, prefix=1, infix=0)
    assert [path for path, _, _ in budget.blocks] == ["encoder.block", "decoder.block"]
    assert budget["PreLayer"] == 4 * 32
    assert budget["FT-top2"] == sum(p.numel() for p in model.decoder.block[-2:].parameters())


def test_bad_settings_of_a_budget():
    """Everything that is wrong is listed; a model without blocks is refused with a way out."""
    with pytest.raises(li.SpecError) as error:
        analysis.parameter_budget(llama(), prefix=-1, bottleneck=1.5)
    assert len(error.value.problems) == 2
    with pytest.raises(li.SpecError, match="find"):
        analysis.parameter_budget(nn.Sequential(nn.Linear(3, 3)), targets=["all-linear"])
