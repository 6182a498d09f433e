"""Names that image trainers take from the original code of a model, where diffusers has others: SAI's U-Net (SD 1 and 2, SDXL) and Flux.

    input_blocks_4_1_transformer_blocks_0_attn1_to_q    down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q
    double_blocks_0_img_attn_qkv                        transformer_blocks.0.attn.to_q, .to_k and .to_v: rows of the one, in this order

Sources: CompVis/Stability-AI's `openaimodel.py` (blocks counted one by one, a stage of the U-Net being `LAYERS` of them), black-forest-labs'
`flux/model.py` (fused qkv, and in single blocks qkv with the MLP's first half), and diffusers' `UNet2DConditionModel`, `FluxTransformer2DModel`.
"""

from __future__ import annotations

import re

LAYERS = 3  # of a stage: layers_per_block 2, and the down- or upsampler

RESNET = {"in_layers_0": "norm1", "in_layers_2": "conv1", "out_layers_0": "norm2", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
          "skip_connection": "conv_shortcut"}  # fmt: skip
ONCE = {"input_blocks_0_0": "conv_in", "out_0": "conv_norm_out", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
        "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2"}  # fmt: skip


def _down(n: int, part: int, rest: str) -> str:
    stage, layer = divmod(n - 1, LAYERS)
    if rest == "op":
        return f"down_blocks_{stage}_downsamplers_0_conv"
    return f"down_blocks_{stage}_{'attentions' if part else 'resnets'}_{layer}_{rest}"


def _up(n: int, part: int, rest: str) -> str:
    stage, layer = divmod(n, LAYERS)
    if rest == "conv":
        return f"up_blocks_{stage}_upsamplers_0_conv"
    return f"up_blocks_{stage}_{'attentions' if part else 'resnets'}_{layer}_{rest}"


def unet(flat: str) -> str | None:
    """diffusers' flat name of a module of SAI's U-Net; None if it is none."""
    if flat in ONCE:
        return ONCE[flat]
    for pattern, block in ((r"input_blocks_(\d+)_(\d+)_(.+)", _down), (r"output_blocks_(\d+)_(\d+)_(.+)", _up)):
        if found := re.fullmatch(pattern, flat):
            return block(int(found[1]), int(found[2]), RESNET.get(found[3], found[3]))
    if found := re.fullmatch(r"middle_block_([012])_(.+)", flat):
        at = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}[found[1]]
        return f"mid_block_{at}_{RESNET.get(found[2], found[2])}"
    return None


DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
BLOCKS: tuple[tuple[str, str, dict[str, tuple[str, ...]]], ...] = (
    (r"double_blocks_(\d+)_(.+)", "transformer_blocks", DOUBLE),
    (r"single_blocks_(\d+)_(.+)", "single_transformer_blocks", SINGLE),
)


def flux(flat: str) -> tuple[str, ...]:
    """diffusers' modules whose rows, one below the other, are those of a module of Flux's own code; none if it has no such module."""
    for pattern, blocks, parts in BLOCKS:
        if found := re.fullmatch(pattern, flat):
            return tuple(f"{blocks}.{found[1]}.{part}" for part in parts.get(found[2], ()))
    return ()
