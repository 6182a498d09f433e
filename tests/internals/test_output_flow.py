"""Which submodules' outputs leave a module, by its source (targets/output_flow.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorainject.targets.output_flow import output_flow


class Net(nn.Module):
    """Some layers for the forwards below."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.table = nn.Parameter(torch.zeros(4, 4))


class Chain(Net):
    def forward(self, x):
        return self.norm(self.b(self.a(x).relu())).view(-1)


class Loop(Net):
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Branches(Net):
    def forward(self, x, labels=None):
        hidden = self.a(x)
        logits = self.b(hidden) if labels is None else hidden
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Refinement(Net):
    def forward(self, x):
        outputs = []
        for layer in self.layers:
            outputs.append(layer(x))
            x = self.a(outputs[-1].detach())
            _, best = torch.topk(outputs[-1], 2)
            x = self.b(x[best])
        return outputs


class Checkpointed(Net):
    def forward(self, x):
        return checkpoint(self.b, checkpoint(self.a, x))


class Method(Net):
    @property
    def head(self):
        return self.b

    def logits(self, hidden):
        return self.head(hidden)

    def forward(self, x):
        return self.logits(hidden=self.a(x))


class Inherited(Method):
    def forward(self, x):
        return super().forward(self.a(x))


class Product(Net):
    def forward(self, x):
        return self.a(x) @ self.b(x).T, nn.functional.linear(x, self.table)


EXPECTED = {
    Chain: {"b"}, Loop: set(), Branches: {"b"}, Refinement: {"layers.0", "layers.1"}, Checkpointed: {"b"},
    Method: {"b"}, Inherited: {"b"}, Product: {"table"},
}  # fmt: skip


@pytest.mark.parametrize("cls", EXPECTED)
def test_leaving_outputs(cls):
    """Outputs are followed through norms, branches, loops, lists, methods and functions, but not through detach."""
    net = cls()
    names = {id(m): name for name, m in net.named_modules()}
    leaving = output_flow(net).leaving
    assert {names[id(o.module)] if o.parameter is None else o.parameter for o in leaving} == EXPECTED[cls]


def test_a_sequential_ends_with_its_last_weight():
    """The output of an nn.Sequential is that of its last module with weights."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout())
    assert [o.module for o in output_flow(net).leaving] == [net[2]]
