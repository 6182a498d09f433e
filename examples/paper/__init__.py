"""The claims of the LoRA paper that can be computed on one machine, computed: `scripts/paper` writes docs/paper.md.

reference       values of the paper's tables
claims          parameters, memory, table 7's baseline, operators and FLOPs, by arithmetic on the meta device
adapter_layers  Adapter H and L, the baselines that add layers
experiments     which matrices and which rank, on MiniLM and code search, beside full fine-tuning and BitFit
page            the page and its plots

Source: Hu et al. 2021, arXiv 2106.09685v2.
"""
