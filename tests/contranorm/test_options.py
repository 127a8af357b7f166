"""The experiments' switches: one spelling, and values that make no sense are refused by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from contranorm import ContraNorm, ContraStep, GraphContraNorm
from contranorm.options import ContraNormOptions
from repro.config import parse_config


def test_switches_are_the_layers_keywords():
    given = dict(tau=0.5, identity=True, symmetric=True, pre_norm=True, learnable=True, positive=True)
    options = ContraNormOptions(scale=0.1, **given)
    options.check_switches()
    for layer in (ContraNorm(4, 0.1, **options.switches()), ContraStep(0.1, dim=4, **options.switches())):
        assert all(getattr(layer, name) == value for name, value in options.switches().items())
    assert GraphContraNorm(0.1, dim=4, **options.switches()).identity is True
    assert options.changed_switches() == ["scale", *given]


def test_an_unset_identity_is_the_experiments_to_decide():
    assert ContraNormOptions(scale=0.1).switches()["identity"] is None
    assert ContraNormOptions().changed_switches() == []
    ContraNormOptions().check_switches()  # vanilla


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(scale=0.0), "--scale must be > 0"),
        (dict(scale=-0.1), "--scale"),
        (dict(scale=float("nan")), "--scale"),
        (dict(tau=0.0), "--tau must be > 0"),
        (dict(axis="rows"), "--axis"),
        (dict(positive=True), "--positive needs learnable"),
        (dict(learnable=True, positive=True, scale=None), "--positive"),
        (dict(implementation="fast"), "--implementation"),
        (dict(implementation="linear", degree=3), "--degree must be 1 or 2"),
        (dict(degree=1), "--degree belongs to --implementation linear"),
        (dict(implementation="plain", axis="features"), "--implementation belongs to --axis tokens"),
        (dict(implementation="fused", symmetric=True), "--implementation fused has no symmetric form"),
    ],
)
def test_senseless_switches_are_refused_by_flag(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ContraNormOptions(**{"scale": 0.1, **wrong}).check_switches()


def test_the_released_flags_are_aliases():
    @dataclass(kw_only=True)
    class Config(ContraNormOptions):
        """Settings of a test."""

    config = parse_config(Config, ["--norm_scale", "0.2", "--temp", "0.5", "--dual-norm", "--no_identity"], prog="test")
    assert (config.scale, config.tau, config.symmetric, config.identity) == (0.2, 0.5, True, False)


def test_the_step_s_name_in_tables():
    assert ContraNormOptions(scale=1.0).step_name() == "ContraNorm s=1"
    assert ContraNormOptions(scale=0.5).step_name("Eq. 6") == "ContraNorm (Eq. 6) s=0.5"
    assert ContraNormOptions(scale=0.1, axis="features").step_name() == "D-ContraNorm s=0.1"
    assert ContraNormOptions(scale=0.1, scaled_identity=True).step_name() == "ContraNorm (scaled identity) s=0.1"


def test_layers_refuse_forms_that_could_never_run():
    with pytest.raises(ValueError, match="sdpa has no symmetric form"):
        ContraNorm(6, 0.3, symmetric=True, implementation="sdpa")
    with pytest.raises(ValueError, match="'fused' leaves out no pairs"):
        GraphContraNorm(0.3, implementation="fused")
