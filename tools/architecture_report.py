"""The report on all architectures, docs/architectures.md, from the rows that architectures.py makes."""

from __future__ import annotations

import collections
import platform
import re
from collections.abc import Mapping
from typing import Any

import torch

import lorainject as li


def percent(value: float | None) -> str:
    """Return a share in per cent; empty if there is none."""
    return "" if value is None else f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


INTRO = """# Architectures

Every model type that transformers knows, tiny and with random weights (`tests/support/zoo.py`), under lorainject
{version} and under PEFT: {versions}. Made by `{command}`.

Both libraries adapt `all-linear` with r = 4. A and B get random values, and the model is compared with a dense oracle,
a copy of the base with the weights W0 + s B A. `ok` means for lorainject: the output right after inject is the base's;
the output and the gradients of every A and B are the oracle's; merge, unmerge (to the bit, also in bfloat16), save,
load and eject hold. For PEFT it means that the output, the gradients (zero or not), load and merge hold; whether
unmerge was exact is counted apart.

*share*: how much of the parameters that were seen in matrix products is adapted, by number of elements. Heads and
routers that lorainject leaves out by design are not counted there, but under *all*. *conv*: the share of convolutions.
A site is *dead* if the base's own weight has no gradient in this forward. *float64*: rounding in float32 changed a
choice, and in float64 everything agrees.
"""


def report(rows: list[dict[str, Any]], command: str) -> str:
    """Return the text of docs/architectures.md."""
    import peft
    import transformers

    rows = sorted(rows, key=lambda r: r["type"].lower())
    built = [r for r in rows if "ours" in r]
    ours, theirs = ([r[who] for r in built if who in r] for who in ("ours", "peft"))

    linear = [r for r in built if r["ours"].get("targets") == "all-linear"]

    def holds(who: str, least: float) -> str:
        return str(sum(r.get(who, {}).get("verdict") == "ok" and (r[who].get("share") or 0) >= least for r in linear))

    def count(columns: list[dict[str, Any]], verdict: str) -> str:
        return str(sum(c["verdict"] == verdict for c in columns))

    def exact(columns: list[dict[str, Any]]) -> str:
        return f"{sum(bool(c.get('exact')) for c in columns)} of {sum('exact' in c for c in columns)}"

    verdicts = {"ok": "every check holds", "refused": "refused by name, in whole or in part",
                "unreached": "adapters that silently do nothing",
                "wrong": "another check failed", "error": "raised"}  # fmt: skip
    packages = f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__}"
    versions = f"{packages}, Python {platform.python_version()}"
    lines = [
        INTRO.format(versions=versions, version=li.__version__, command=command),
        "| | lorainject | PEFT |", "|---|---|---|",
        f"| types that transformers knows | {len(rows)} | |",
        f"| of these built and run here | {len(built)} | |",
        *(f"| {label} | {count(ours, key)} | {count(theirs, key)} |" for key, label in verdicts.items()),
        f"| of the {len(linear)} with anything linear: every check holds | {holds('ours', 0)} | {holds('peft', 0)} |",
        f"| ... and 99.9 % of the matmul weights are adapted | {holds('ours', 0.999)} | {holds('peft', 0.999)} |",
        f"| unmerge exact in float32, where merge was possible | {exact(ours)} | {exact(theirs)} |", "",
    ]  # fmt: skip
    lines += heads_section({cls: left_out for r in built for cls, left_out in r.get("heads", {}).items()})
    for title, columns in (("Reasons, lorainject", ours), ("Reasons, PEFT", theirs)):
        reasons = collections.Counter(_general(c.get("reason") or c.get("refused") or "") for c in columns)
        reasons.pop("", None)
        lines += [f"## {title}", "", *(f"- {n}: {reason}" for reason, n in reasons.most_common(40)), ""]
    lines += [
        "## Types",
        "",
        "| type | parameters | lorainject | share | all | conv | PEFT | share | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(r) for r in built]
    lines += ["", "## Not built or not run", "", "| type | reason |", "|---|---|"]
    lines += [f"| {r['type']} | {_cell(r.get('reason', ''))} |" for r in rows if "ours" not in r]
    return "\n".join(lines) + "\n"


def heads_section(heads: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the section on heads: what all-linear leaves out in the classes for tasks, counted by reason and name.

    Args:
        heads: For each class, what is left out with the reasons.
    """
    reasons: dict[str, collections.Counter[str]] = {}
    for left_out in heads.values():
        for name, reason in {_last_names(name): reason for name, reason in left_out.items()}.items():
            reasons.setdefault(reason, collections.Counter())[name] += 1
    lines = [
        "## Heads",
        "",
        f"What `all-linear` leaves out in {len(heads)} classes for tasks; {sum(map(bool, heads.values()))} of them have"
        " something that it leaves out."
        " A name stands for all layers that end with it, and its number for the classes that have them.",
        "",
        "| reason | classes | names |",
        "|---|---|---|",
    ]
    for reason, names in sorted(reasons.items(), key=lambda item: -item[1].total()):
        classes = sum(reason in left_out.values() for left_out in heads.values())
        shown = ", ".join(f"{name} {count}" for name, count in names.most_common(40))
        lines.append(f"| {reason} | {classes} | {shown}{', ...' if len(names) > 40 else ''} |")
    return [*lines, ""]


def with_heads(page: str, heads: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page with another section on heads."""
    before, _, rest = page.partition("## Heads\n")
    before, rest = (before, "## " + rest.partition("\n## ")[2]) if rest else page.split("## Reasons, lorainject", 1)
    rest = rest if rest.startswith("## ") else "## Reasons, lorainject" + rest
    return before + "\n".join(heads_section(heads)) + "\n" + rest


def _last_names(name: str) -> str:
    """Return the last two parts of a name, with * for numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split(".")[-2:])


def _line(row: Mapping[str, Any]) -> str:
    """Return the line of one type in the table."""
    ours, theirs = row["ours"], row.get("peft", {})
    notes = [
        ours.get("reason") or ours.get("refused"),
        f"{ours['dead']} sites dead" if ours.get("dead") else "",
        f"merge refused: {ours['tied']} tied" if ours.get("tied") else "",
        "float64" if ours.get("float64") else "",
        f"missed: {ours['missed'][0]}" if ours.get("missed") else "",
        f"PEFT: {theirs['reason']}" if theirs.get("reason") else "",
    ]
    cells = [
        row["type"], f"{row['parameters']:,}",
        ours["verdict"], *(percent(ours.get(key)) for key in ("share", "share_all", "share_conv")),
        theirs.get("verdict", ""), percent(theirs.get("share")), _cell("; ".join(n for n in notes if n)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _general(reason: str) -> str:
    """Return a reason without names and numbers, so that equal reasons can be counted."""
    text = reason.split(" (float64")[0].split(" (")[0]
    text = re.sub(r"\b[\w]+(\.[\w]+)+\b|'[^']*'", "…", text)
    return re.sub(r"(?<!\w)[-+]?\d[\d.e+-]*", "n", text)[:140]


def _cell(text: str) -> str:
    """Return a text that fits into a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")[:300]
