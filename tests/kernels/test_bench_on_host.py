"""bench.gpu with the host device in place of a GPU: its own kernels, verified, measured and soaked."""

from __future__ import annotations

import sys

import pytest
from host_device import on_host

import rnnkit
from bench import cases, timing
from bench.gpu import measure, plan, rig, sides, soak
from rnnkit import kernels


@pytest.fixture
def host(monkeypatch):
    """Return a rig whose NumPy arrays go to the CUDA kernels on the host device."""
    module = on_host()
    monkeypatch.setitem(sys.modules, "rnnkit.kernels.cuda", module)
    monkeypatch.setattr(rnnkit.kernels, "cuda", module, raising=False)
    monkeypatch.setitem(kernels._MODULES, "numpy", ("cuda", "reference"))
    monkeypatch.setattr(module.device, "launches", [])
    monkeypatch.setattr(module.device, "order", "uneven")
    kernels._choose.cache_clear()
    made = rig.Host()
    made.torch_device = None
    made.launches = module.device.launches
    yield made
    kernels._choose.cache_clear()


def launched(host):
    """Return how many kernels of whole sequences and how many others were launched."""
    whole = sum(name.endswith("_persistent") for name in host.launches)
    return whole, len(host.launches) - whole - host.launches.count("product")


def test_each_level_launches_its_own_kernels(host):
    problem = sides.problem_of(plan.Cell(cases.Case("train", "lstm", 4, 5, 6, 24)))
    seen = {}
    for kernel in sides.kernels_of(host):
        host.launches.clear()
        sides.side_of(problem, kernel, host).compute()
        seen[kernel] = launched(host)
    assert seen == {sides.WHOLE: (2, 0), "cuda": (0, 8), "reference": (0, 0)}


def test_a_measured_cell_has_the_model_of_its_plan(host):
    found = measure.measure(
        "q", plan.Cell(cases.Case("train", "gru", 3, 5, 6, 24)), host, timing.Effort(0.0, 1)
    )
    assert {record["status"] for record in found} == {"ok"}
    model = found[0]["model"]
    assert set(model) == {"gru_forward", "gru_backward"}
    assert all(sum(parts.values()) > 0 for parts in model.values())


def test_two_directions_have_a_model_of_both(host):
    """Also where they are a launch each: then it is twice that of one."""
    case = cases.Case("train", "lstm", 3, 5, 6, 24)
    for directions, least, most in ((1, 1.0, 1.0), (2, 1.0, 2.0)):
        both, one = (sides.model_of(case, host, each) for each in (directions, 1))
        for name, parts in both.items():
            assert least * sum(one[name].values()) <= sum(parts.values()) <= most * sum(one[name].values())
    found = measure.measure(
        "q", plan.Cell(case, False, True, 2, 2), host, timing.Effort(0.0, 1)
    )  # fmt: skip
    assert {record["status"] for record in found} == {"ok"}
    assert found[0]["model"] == sides.model_of(case, host, 2)


def test_what_does_not_fit_says_why(host):
    case = cases.Case("forward", "lstm", 3, 5, 6, 1 << 15)
    assert "hidden units are too many" in sides.why_not(sides.WHOLE, case, host)
    assert sides.model_of(case, host) == {"lstm_forward": {}}
    assert sides.why_not("cuda", case, host) is None


def test_soaking(host, monkeypatch):
    draw = soak.draw
    monkeypatch.setattr(
        soak, "draw",
        lambda random: draw(random)._replace(precision="float32", T=3, B=9, H=int(random.integers(4, 40))),
    )  # fmt: skip
    assert soak.soak(host, 3 * soak.REPEATS, 1) == []
    assert launched(host)[0] >= 2 * 3 * soak.REPEATS
