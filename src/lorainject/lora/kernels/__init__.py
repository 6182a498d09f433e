"""Every special case for speed, behind one door.

Two functions lead in. `fused_forward` (fused_forward.py) computes a plain nn.Linear together with its term, or returns
None; the table TERMS (terms.py) names the function that adds the term of a weight to any other layer's output.

    fused_forward   nn.Linear with a single active adapter, without a call of the modules that hold it
    lora_linear     the term of a linear layer: in place in inference; in training one node of the graph with the base
    per_row         one adapter per row of a batch (`rows`), and a kernel for rows of few tokens
    gemm            the matrix products, and how a CPU computes them in half precision

Each special case says where it stands what it gains, in which row of the benchmark and on which processor. What was
tried and deleted is listed in docs/kernels.md. Code outside of this package knows nothing of token counts, caches or
what a BLAS library does.
"""
