"""Values of the paper's tables, for comparison. Scores are percentages."""

TABLE_5 = {
    "q, r=8": (70.4, 91.0), "k, r=8": (70.0, 90.8), "v, r=8": (73.0, 91.0), "o, r=8": (73.2, 91.3),
    "qk, r=4": (71.4, 91.3), "qv, r=4": (73.7, 91.3), "qkvo, r=2": (73.7, 91.7),
}  # fmt: skip
"""WikiSQL and MultiNLI with 18M parameters on GPT-3 175B, by the adapted matrices."""

RANKS = (1, 2, 4, 8, 64)
TABLE_6 = {
    "q": ((68.8, 69.6, 70.5, 70.4, 70.0), (90.7, 90.9, 91.1, 90.7, 90.7)),
    "qv": ((73.4, 73.3, 73.7, 73.8, 73.5), (91.3, 91.4, 91.3, 91.6, 91.4)),
    "qkvo": ((74.1, 73.7, 74.0, 74.0, 73.9), (91.2, 91.7, 91.7, 91.5, 91.4)),
}
"""WikiSQL and MultiNLI at each of RANKS, by the adapted matrices."""

TABLE_7_NORM = 61.95
"""|W_q| of layer 48 of GPT-3 175B."""
TABLE_7_RANDOM = {4: 0.02, 64: 0.33}
"""|U^T W_q V| for random U and V, by rank."""
