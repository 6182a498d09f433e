"""Module names of image models in adapter files: kohya's prefixes, and the names of the models' original code.

Kohya's files join a prefix, which says the part of the pipeline, and the module's path with _ in place of dots. Many
trainers take the path from the model's original code, where diffusers has other modules:

    input_blocks_4_1_proj_in        down_blocks_1_attentions_0_proj_in                   SD 1 and 2, SDXL
    double_blocks_0_img_attn_qkv    transformer_blocks.0.attn.to_q, .to_k and .to_v      Flux: the rows of the fused
                                                                                         weight, in this order

The original U-Net counts its blocks one by one; each stage of diffusers' U-Net has BLOCKS_PER_STAGE of them.

Sources: CompVis/Stability-AI's `openaimodel.py`, black-forest-labs' `flux/model.py` (fused qkv, and in single blocks
qkv with the first half of the MLP), and diffusers' `UNet2DConditionModel` and `FluxTransformer2DModel`.
"""

from __future__ import annotations

import re

# The parts of a pipeline, in diffusers' words, that each of kohya's prefixes may mean. Longer prefixes come first.
PREFIXES = {
    "lora_prior_unet_": ("prior",), "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",), "lora_te1_": ("text_encoder",), "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",), "lora_te_": ("text_encoder",), "lycoris_": ("unet", "transformer"),
}  # fmt: skip

BLOCKS_PER_STAGE = 3  # layers_per_block = 2, and the down- or upsampler
UNET_MODULES = {
    "input_blocks_0_0": "conv_in", "out_0": "conv_norm_out", "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
RESNET_LAYERS = {"in_layers_0": "norm1", "in_layers_2": "conv1", "out_layers_0": "norm2", "out_layers_3": "conv2",
                 "emb_layers_1": "time_emb_proj", "skip_connection": "conv_shortcut"}  # fmt: skip
MIDDLE_BLOCKS = ("resnets_0", "attentions_0", "resnets_1")

FLUX_DOUBLE_BLOCK = {
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
FLUX_SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}


def kohya_prefix(name: str) -> str:
    """Return the prefix of PREFIXES that a flat name begins with; empty if it begins with none."""
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


def unet_name(name: str) -> str | None:
    """Return diffusers' flat name for a module of the original U-Net; None if the name is none of that U-Net's."""
    if name in UNET_MODULES:
        return UNET_MODULES[name]
    if match := re.fullmatch(r"middle_block_([012])_(.+)", name):
        return f"mid_block_{MIDDLE_BLOCKS[int(match[1])]}_{RESNET_LAYERS.get(match[2], match[2])}"
    if (match := re.fullmatch(r"(input|output)_blocks_(\d+)_(\d+)_(.+)", name)) is None:
        return None
    downward, rest = match[1] == "input", RESNET_LAYERS.get(match[4], match[4])
    stage, block = divmod(int(match[2]) - downward, BLOCKS_PER_STAGE)  # input block 0 is conv_in
    prefix = f"{'down' if downward else 'up'}_blocks_{stage}"
    if rest == ("op" if downward else "conv"):
        return f"{prefix}_{'down' if downward else 'up'}samplers_0_conv"
    return f"{prefix}_{'attentions' if int(match[3]) else 'resnets'}_{block}_{rest}"


def flux_paths(name: str) -> tuple[str, ...]:
    """Return the paths of diffusers' modules that hold, in this order, the rows of a module of the original Flux.

    Empty if the flat name is none of Flux's.
    """
    if match := re.fullmatch(r"double_blocks_(\d+)_(.+)", name):
        return tuple(f"transformer_blocks.{match[1]}.{part}" for part in FLUX_DOUBLE_BLOCK.get(match[2], ()))
    if match := re.fullmatch(r"single_blocks_(\d+)_(.+)", name):
        return tuple(f"single_transformer_blocks.{match[1]}.{part}" for part in FLUX_SINGLE_BLOCK.get(match[2], ()))
    return ()
