"""The command `scripts/paper`."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch

from .claims import latency_rows, parameter_claims, random_baseline_claim, training_flops
from .experiments import QUICK, WHOLE, run
from .page import write_page


def main() -> None:
    """Compute the claims, run the experiments, and write the page."""
    parser = argparse.ArgumentParser(description="Compute the claims of the LoRA paper, and write docs/paper.md.")
    parser.add_argument("--quick", action="store_true", help="fewer runs and steps, about three minutes on two cores")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/paper.md"), help="the page to write")
    arguments = parser.parse_args()
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    torch.manual_seed(0)
    say("claims by arithmetic")
    claims = [*parameter_claims(), random_baseline_claim(), *training_flops()]
    latency = latency_rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        results = run(QUICK if arguments.quick else WHOLE, say)
    write_page(arguments.output, claims, latency, results, "quick" if arguments.quick else "whole")
    say(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
