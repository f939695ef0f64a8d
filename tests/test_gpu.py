"""What only an accelerator can show; on a machine without one these tests are skipped."""

import device_work
import pytest
import torch
from device_work import N, network, samples
from torch.nn import functional as F

import robustlearn as rl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator"),
]
ALIKE = [  # what is smooth enough for another order of sums to change little
    "objective pgd_at",
    "objective trades",
    "attack pgd inf",
    "attack fmn 2",
    "attack square inf",
    "evaluate errors",
    "validate",
]


@pytest.mark.parametrize("name", ALIKE)
def test_it_gives_what_the_cpu_gives(name):
    work = device_work.works()[name]
    plain, there = work(torch.device("cpu")), work(torch.accelerator.current_accelerator())
    for key, value in plain.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(there[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", device_work.works())
def test_nothing_names_another_device(name):
    device_work.works()[name](torch.accelerator.current_accelerator())


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "channels_last": True, "pin_memory": True},
        {"precision": "fp16"},
        {"compile": True},
    ],
    ids=str,
)
def test_what_is_for_speed_lowers_the_loss_all_the_same(options):
    given = {"epochs": 8, "batch_size": N, "lr": 0.02, "validation": None, "schedule": "constant"}
    rows = rl.fit(network(), samples(24), device_work.BALL, **given, **options).history.rows
    assert rows[-1]["metrics"]["loss"] < rows[0]["metrics"]["loss"]
    assert rows[-1]["skipped"] == 0


def test_pinned_batches_are_the_same_batches():
    weights = [
        rl.fit(network(), samples(24), device_work.BALL, epochs=2, validation=None, pin_memory=pin)
        for pin in (False, True)
    ]
    first, second = (result.history.weights["model"] for result in weights)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)


def test_the_network_stays_where_it_was():
    net, (x, y) = network().eval(), samples()
    rl.evaluate(net, x, y, device_work.BALL, attacks="fgsm", device="auto")
    assert {p.device.type for p in net.parameters()} == {"cpu"}
    with torch.no_grad():
        assert F.cross_entropy(net(x), y).isfinite()
