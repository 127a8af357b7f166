"""The front page's equation and its first snippet, against the layer."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contranorm import ContraNorm


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return unicodedata.normalize("NFC", (root / "README.md").read_text(encoding="utf-8"))


def equation_of(readme: str) -> str:
    """What stands behind `ContraNorm(H) =`, without spaces."""
    (line,) = re.findall(r"^\s+ContraNorm\(H\)\s*=(.*)$", readme, re.MULTILINE)
    equation, where = re.sub(r"\s", "", line).split(",", maxsplit=1)
    assert "ĤĤᵀ" in equation and where == "Ĥ=rowsofHatunitlength"
    return equation


def evaluate(equation: str, h: Tensor, s: float, tau: float) -> Tensor:
    """The equation in plain torch, read as it is written."""
    replacements = {"ĤĤᵀ": "unit@unit.mT", ")H": ")@H", "·H": "@H", "·": "*", "−": "-", "τ": "tau"}
    for written, python in replacements.items():
        equation = equation.replace(written, python)
    names = {
        "H": h, "unit": F.normalize(h, dim=-1), "s": s, "tau": tau,
        "softmax": lambda logits: logits.softmax(dim=-1), "LayerNorm": lambda x: F.layer_norm(x, x.shape[-1:]),
    }  # fmt: skip
    return eval(equation, names)


def test_the_equation_is_what_the_layer_computes(readme):
    h = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    want = evaluate(equation_of(readme), h, 0.7, 0.5)
    torch.testing.assert_close(ContraNorm(6, 0.7, tau=0.5)(h), want, atol=1e-5, rtol=0)


def test_the_first_snippet_runs_prints_its_effect_and_is_the_equation(readme, capsys):
    snippet = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert snippet is not None
    names: dict = {}
    exec(compile(snippet[1], "README.md", "exec"), names)
    cosine, rank = (tuple(map(float, line.split("->"))) for line in capsys.readouterr().out.splitlines()[:2])
    assert cosine[0] > 0.9 and abs(cosine[1]) < 0.1  # collapsed before, not after
    assert rank[1] > 1.5 * rank[0]
    want = evaluate(equation_of(readme), names["x"], names["norm"].scale, names["norm"].tau)
    torch.testing.assert_close(names["y"], want, atol=1e-5, rtol=0)
    stepped = F.layer_norm(names["step"], names["x"].shape[-1:])  # the function's default is the layer's
    torch.testing.assert_close(stepped, want, atol=1e-5, rtol=0)
