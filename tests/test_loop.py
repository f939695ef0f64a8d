"""The training loop against bare loops, closed forms, and itself after a kill."""

import doctest
import importlib.util
import itertools
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import games
import numpy as np
import pytest
import torch
from games import N, Noisy, network, plain, samples, train
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.loop import Samples, checkpoint, play, rate
from robustlearn.loop.ranks import Ranks


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class Plain:
    """Mean cross-entropy, and whatever the test does to the losses."""

    def __init__(self, change=None, net=None, lr=0.1):
        self.modules = {"model": net if net is not None else network()}
        parameters = self.modules["model"].parameters()
        self.optimizers = {"model": torch.optim.SGD(parameters, lr)}
        self.change, self.seen, self.rates, self.drawn = change, [], [], []

    def step(self, batch, turn):
        self.seen.append(batch.index.tolist())
        self.rates.append(self.optimizers["model"].param_groups[0]["lr"])
        self.drawn.append((torch.rand(1).item(), turn.keys.tolist()))
        losses = F.cross_entropy(turn.module("model")(batch.x), batch.y, reduction="none")
        turn.backward(losses if self.change is None else self.change(losses, turn))
        turn.update("model")
        return {"loss": losses}

    @property
    def weights(self):
        return self.modules["model"].state_dict()


# ------------------------------------------------------------------ one step


def test_a_run_equals_a_bare_loop():
    game, net = Plain(), network()
    play(game, samples(), epochs=2, batch_size=8, seed=3)
    x, y = samples()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for index in game.seen:
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(game.weights[name], value)


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_frozen_in_evaluation_mode_stays_there(whole):
    net = nn.Sequential(nn.BatchNorm1d(games.D), network())
    (net if whole else net[0]).eval()
    play(Plain(net=net), samples(), epochs=2, batch_size=8, validate=lambda modules: {"none": 0.0})
    assert bool(net[0].running_mean.any()) == whole
    assert [net.training, net[0].training] == [not whole, False]


def test_samples_that_are_held_out_take_their_weights_along():
    x, y = torch.arange(6.0)[:, None], torch.arange(6)
    whole = Samples((x, y), weights=[0, 1, 0, 2, 0, 5], extra=(-x, y), ratio=0.5)
    rest, (held, labels) = whole.split(torch.tensor([0, 5]))
    assert (held.tolist(), labels.tolist()) == ([[0.0], [5.0]], [0, 5])
    drawn = torch.cat([torch.cat(rest.batches(0, epoch, 3)) for epoch in range(9)])
    (own, _), (more, _) = rest.fetch([drawn[drawn < 4], drawn[drawn >= 4]], 0, 0)
    assert set(own.flatten().tolist()) == {1.0, 3.0}
    assert set(more.flatten().tolist()) == {-float(i) for i in range(6)}


@pytest.mark.parametrize("extra", [(torch.zeros(3, 2), torch.zeros(3)), torch.zeros(3, 1)])
def test_extra_data_of_another_shape_is_refused(extra):
    with pytest.raises(InputError, match="same kind"):
        Samples((torch.zeros(4, 1), torch.zeros(4)), extra=extra, ratio=0.5)


def test_metrics_are_means_over_samples():
    game = Plain(lr=0.0)
    history = play(game, samples(), epochs=1, batch_size=10)
    x, y = samples()
    expected = F.cross_entropy(network()(x), y).item()
    assert history.rows[0]["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_accumulated_batches_are_one_large_batch():
    """Batches of 5 + 5 + 5 + 4 (+ …) in groups of 4, the last one smaller."""
    game, net = Plain(), network()
    play(game, samples(), epochs=1, batch_size=5, accumulate=3)
    x, y = samples()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    assert len(game.seen) == 8
    for first in range(0, 8, 3):
        index = list(itertools.chain(*game.seen[first : first + 3]))
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(game.weights[name], value)


def test_clip_bounds_the_step():
    game = Plain(lambda losses, turn: 1e4 * losses, lr=1.0)
    before = {k: v.clone() for k, v in game.weights.items()}
    play(game, samples(), epochs=1, batch_size=N, clip=0.5)
    moved = sum((game.weights[k] - v).square().sum() for k, v in before.items()).sqrt()
    assert moved.item() == pytest.approx(0.5, rel=1e-4)


def test_average_follows_its_recursion_with_statistics_of_its_own():
    game, seen = Noisy(norm=True), []

    def validate(modules):
        seen.append({k: v.clone() for k, v in modules["model"].state_dict().items()})
        seen.append({k: v.clone() for k, v in game.modules["model"].state_dict().items()})
        return {"accuracy": 0.0}

    play(game, samples(), epochs=3, batch_size=N, ema=0.15, validate=validate)
    expected = network(norm=True).state_dict()
    for t, live in enumerate(seen[1::2]):
        decay = min(0.15, (1 + t) / (10 + t))
        for name in ("0.weight", "1.running_mean", "1.running_var"):
            expected[name] = decay * expected[name] + (1 - decay) * live[name]
            torch.testing.assert_close(seen[2 * t][name], expected[name])


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("cosine", [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]),
        ("step", [1, 1, 0.1, 0.01]),
        ("one_cycle", [rate("one_cycle", t / 4) for t in range(4)]),
    ],
)
def test_schedules(schedule, factors):
    game = Plain(lr=0.2)
    play(game, samples(), epochs=4, batch_size=N, schedule=schedule)
    assert game.rates == pytest.approx([0.2 * factor for factor in factors])


def test_one_cycle_peaks_where_it_turns():
    assert rate("one_cycle", 0.0) == pytest.approx(0.04)
    assert rate("one_cycle", 0.3) == pytest.approx(1.0)
    assert rate("one_cycle", 1.0) == pytest.approx(0.0)


def test_modes_and_global_random_state_are_put_back(untouched):
    game = Noisy(norm=True, dropout=0.5)
    game.modules["model"].eval()
    play(game, samples(), epochs=1, batch_size=8)
    assert not any(part.training for part in game.modules["model"].modules())


def test_reduced_precision_trains_and_keeps_float32_weights():
    for precision in ("bf16", "fp16"):
        history, weights = train(game=Noisy(), precision=precision, epochs=4)
        assert {value.dtype for value in weights.values()} == {torch.float32}
        rows = plain(history)
        assert rows[-1]["metrics"]["loss"] < rows[0]["metrics"]["loss"], precision


class Images(Plain):
    """Cross-entropy of a convolutional network with batch norm, and how its tensors lay."""

    def __init__(self):
        with torch.random.fork_rng([], device_type="cpu"):
            torch.manual_seed(0)
            conv, norm, linear = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)
        super().__init__(net=nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), linear))
        self.innermost = set()

    def step(self, batch, turn):
        for values in (batch.x, self.modules["model"][0].weight):
            self.innermost.add(values.is_contiguous(memory_format=torch.channels_last))
        return super().step(batch, turn)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    "switch", ["channels_last", "pin_memory", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_a_switch_for_speed_changes_no_weight(tmp_path, switch):
    x = torch.randn(N, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    y, given = samples()[1], {"epochs": 2, "batch_size": 8}
    bare, fast = Images(), Images()
    play(bare, (x, y), **given)
    play(fast, (x, y), **given, **{switch: True})
    for name, value in bare.weights.items():
        torch.testing.assert_close(fast.weights[name], value, rtol=1e-4, atol=1e-5)
    assert bare.innermost == {False}
    assert fast.innermost == {switch == "channels_last"}
    more = {**given, "out": tmp_path, "save_every": 0.0, switch: True}
    with pytest.raises(Fall):
        play(Images(), (x, y), progress=stop_at(7), **more)
    resumed = Images()
    play(resumed, (x, y), resume=True, **more)
    assert equal(resumed.weights, fast.weights)


def test_fp16_halves_its_scale_until_the_gradient_is_finite():
    """2¹⁶·1e4/8 overflows float16, 2⁵·1e4/8 does not: 11 updates are left out, no rate changes."""

    class Half(Plain):
        def step(self, batch, turn):
            halves = turn.module("model")(batch.x)[:, 0].half()
            turn.backward(1e4 * halves.float())
            turn.update("model")
            self.rates.append(self.optimizers["model"].param_groups[0]["lr"])
            return {}

    game = Half(lr=1e-9)
    options = {"batch_size": 8, "precision": "fp16", "on_nonfinite": "halve"}
    history = play(game, (samples(40)[0], samples(40)[1]), epochs=4, **options)
    assert [row["skipped"] for row in history.rows] == [5, 5, 1, 0]
    assert set(game.rates) == {1e-9}


# ------------------------------------------------------------------ samples


def test_random_numbers_are_a_function_of_seed_epoch_step_and_sample():
    first, second = Plain(), Plain()
    play(first, samples(), epochs=2, batch_size=8, seed=1)
    torch.rand(100)
    play(second, samples(), epochs=2, batch_size=8, seed=1)
    assert first.seen == second.seen
    assert first.drawn == second.drawn
    keys = [dict(zip(i, k, strict=True)) for i, (_, k) in zip(first.seen, first.drawn, strict=True)]
    wider = Plain()
    play(wider, samples(), epochs=1, batch_size=20, seed=1)
    for index, (_, drawn) in zip(wider.seen, wider.drawn, strict=True):
        for number, key in zip(index, drawn, strict=True):
            assert key == next(k[number] for k in keys[:5] if number in k)
    assert first.seen[:5] != first.seen[5:]
    assert len({draw for draw, _ in first.drawn}) == 10


def test_batches_are_permutations_of_equal_size():
    for n, size in ((37, 8), (65, 64), (3, 5)):
        batches = Samples((torch.zeros(n, 1), torch.zeros(n))).batches(0, 0, size)
        lengths = [len(batch) for batch in batches]
        assert torch.cat(batches).sort().values.tolist() == list(range(n))
        assert max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1
        assert len(lengths) == -(-n // size)


def test_weights_of_classes_set_how_often_they_are_drawn():
    y = torch.tensor([0] * 900 + [1] * 100)
    drawn = Samples((torch.zeros(1000, 1), y), weights={0: 1.0, 1: 9.0})
    share = torch.cat([torch.cat(drawn.batches(0, e, 100)) for e in range(20)]) >= 900
    assert share.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(20_000))
    never = Samples((torch.zeros(1000, 1), y), weights={0: 0.0, 1: 1.0})
    assert torch.cat(never.batches(0, 0, 100)).min() >= 900


def test_extra_data_makes_up_its_share_of_every_batch():
    x, y = samples()
    more = (x[:7] + 100, y[:7])
    mixed = Samples((x, y), extra=more, ratio=0.5)
    batches = mixed.batches(0, 0, 8)
    assert max(map(len, batches)) <= 8
    for index, (fetched, labels) in zip(batches, mixed.fetch(batches, 0, 0), strict=True):
        assert 3 <= int((index >= N).sum()) <= 4
        for number, row, label in zip(index.tolist(), fetched, labels, strict=True):
            source = (x, y) if number < N else more
            at = number if number < N else number - N
            assert torch.equal(row, source[0][at])
            assert label == source[1][at]


class Drawing(Dataset):
    """Items with noise from all three global streams."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        x, y = samples()
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return x[i] + noise.float(), y[i]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_set_and_loader_give_what_the_arrays_give(workers, untouched):
    arrays, loaded = Plain(), Plain()
    play(arrays, samples(), epochs=2, batch_size=8)
    loader = DataLoader(TensorDataset(*samples()), batch_size=8, num_workers=workers)
    play(loaded, loader, epochs=2)
    assert equal(arrays.weights, loaded.weights)


def test_random_items_do_not_depend_on_what_was_fetched_before(untouched):
    drawn = Samples(Drawing())
    batches = drawn.batches(0, 1, 8)
    whole = [x for x, _ in drawn.fetch(batches, 0, 1)]
    rest = [x for x, _ in drawn.fetch(batches[2:], 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert not torch.equal(whole[0], next(iter(drawn.fetch(batches, 0, 2)))[0])


def test_augment_has_keys_of_its_own():
    seen = []

    def augment(x, keys):
        seen.append(keys.tolist())
        return x + _tensor.uniform(keys, x.shape[1:], x.dtype)

    game = Plain()
    play(game, Samples(samples(), augment=augment), epochs=1, batch_size=8)
    assert len(seen) == 5
    assert not {k for ks in seen for k in ks} & {k for _, ks in game.drawn for k in ks}


def test_data_without_labels():
    class Centre:
        def __init__(self):
            self.modules = {"model": nn.Linear(6, 1)}
            self.optimizers = {"model": torch.optim.SGD(self.modules["model"].parameters(), 0.1)}

        def step(self, batch, turn):
            assert batch.y.shape == (len(batch.x), 0)
            losses = turn.module("model")(batch.x).square().squeeze(1)
            turn.backward(losses)
            turn.update("model")
            return {}

    assert play(Centre(), samples()[0], epochs=1, batch_size=8).rows[0]["metrics"] == {}


def picking(**options):
    return Samples(DataLoader(TensorDataset(*samples()), **options))


def test_the_batches_of_a_loader_are_of_its_size():
    plan = BatchSampler(RandomSampler(range(N)), 9, drop_last=False)
    assert picking(batch_sampler=plan).batch_size == 9
    assert picking(batch_size=7, shuffle=True).batch_size == 7


class Items(Dataset):
    """Samples as data sets of images have them: arrays and plain numbers, or x alone."""

    def __init__(self, x, y, kind):
        self.x, self.y, self.kind = x, y, kind

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x, y = self.x[i], self.y[i]
        return {
            "tensor, int": (x, int(y)),
            "arrays": (x.numpy(), np.int64(y)),
            "list": [x.tolist(), int(y)],
            "x alone": x.numpy(),
        }[self.kind]


@pytest.mark.parametrize("extra", ["tensor, int", "arrays", "list", "x alone"])
@pytest.mark.parametrize("whole", [True, False])
def test_extra_items_of_a_data_set_go_into_a_batch_with_arrays(extra, whole):
    x, y = samples()
    own = None if extra == "x alone" else y
    alike = Samples((x, own), extra=(-x[:9], own if own is None else y[:9]), ratio=0.3)
    items = Items(-x[:9], y[:9], extra)
    mixed = Samples((x, own), extra=items if whole else DataLoader(items), ratio=0.3)
    batches = mixed.batches(0, 0, 8)
    pairs = zip(mixed.fetch(batches, 0, 0), alike.fetch(batches, 0, 0), strict=True)
    assert all(torch.equal(a, b) for found, told in pairs for a, b in zip(found, told, strict=True))
    back = Samples(items, extra=(x, own), ratio=0.3)
    (_, labels), *_ = back.fetch(back.batches(0, 0, 8), 0, 0)
    assert labels.dtype == (torch.float32 if own is None else torch.int64)


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1), 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Samples((torch.zeros(3, 1), torch.zeros(2))), "3 samples, y has 2"),
        (lambda: Samples((torch.zeros(0, 1), torch.zeros(0))), "no sample"),
        (lambda: Samples(Endless()), "no numbers"),
        (lambda: Samples(samples(), weights={0: 1, 1: 1, 2: 1, 7: 1}), r"without samples: \[7\]"),
        (lambda: Samples(samples(), weights={0: 1, 1: 1}), r"leaves out the classes \[2\]"),
        (lambda: Samples(samples(), weights=[1.0] * (N - 1)), f"shape \\({N},\\)"),
        (lambda: Samples(samples(), weights=[-1.0] * N), "not negative"),
        (lambda: Samples(samples(), extra=samples()), "ratio"),
        (lambda: Samples(samples(), ratio=0.5), "ratio"),
        (lambda: picking(sampler=SubsetRandomSampler(range(9))), "SubsetRandomSampler of this"),
        (lambda: picking(sampler=RandomSampler(range(N), num_samples=9)), f"each of its {N} samp"),
        (lambda: picking(sampler=RandomSampler(range(N), replacement=True)), "this one may not"),
        (lambda: picking(sampler=WeightedRandomSampler([1.0] * N, N)), r"Samples\(…, weights=…"),
        (lambda: picking(batch_sampler=[[0], [1, 2]]), "this one gives batches by list"),
        (lambda: picking(batch_size=None), "this one gives no batches"),
        (
            lambda: Samples(samples(), extra=DataLoader(Drawing(), sampler=range(9)), ratio=0.5),
            "the range of this one",
        ),
    ],
)
def test_samples_that_cannot_be(make, said):
    with pytest.raises(InputError, match=said):
        make()


# ------------------------------------------------------------------ the best epoch


def test_the_best_epoch_is_kept_and_patience_ends_the_run(tmp_path):
    figures, seen = iter([0.3, 0.5, math.nan, 0.5, 0.4]), []

    def validate(modules):
        seen.append({k: v.clone() for k, v in modules["model"].state_dict().items()})
        return {"other": 1.0, "robust": next(figures)}

    history = play(
        Plain(),
        samples(),
        epochs=9,
        batch_size=8,
        validate=validate,
        figure="robust",
        patience=3,
        out=tmp_path,
    )
    assert (history.best, history.stopped, len(history.rows)) == (1, "patience", 5)
    assert equal(history.weights["model"], seen[1])
    assert equal(load_file(tmp_path / "model.safetensors"), seen[1])


def test_patience_begins_once_the_game_has_settled():
    """While the adversary still grows, figures fall without anything being amiss."""
    figures = iter([0.9, 0.6, 0.4, 0.3, 0.5, 0.2])
    given = {"epochs": 6, "batch_size": 8, "patience": 2}
    game = Plain()
    game.settled = 3
    history = play(game, samples(), validate=lambda m: {"a": next(figures)}, **given)
    assert (history.best, history.stopped, len(history.rows)) == (0, "patience", 5)


def test_without_validation_the_last_weights_are_kept():
    game = Plain()
    history = play(game, samples(), epochs=2, batch_size=8)
    assert (history.best, history.stopped) == (1, "finished")
    assert equal(history.weights["model"], game.weights)


# ------------------------------------------------------------------ resume


class Fall(Exception):
    pass


def stop_at(number):
    """Raise at a global step, as if the machine had fallen."""
    count = iter(range(10**6))

    def progress(moment):
        if moment.validation is None and next(count) == number:
            raise Fall

    return progress


@pytest.mark.parametrize("falls", [[0], [3, 6], [4, 9, 0]])
def test_a_resumed_run_ends_with_equal_weights_and_rows(tmp_path, falls):
    whole, expected = train(accumulate=2)
    for number in falls:
        options = {"accumulate": 2, "save_every": 0.0, "resume": True}
        with pytest.raises(Fall):
            train(tmp_path, progress=stop_at(number), **options)
    history, weights = train(tmp_path, accumulate=2, resume=True)
    assert equal(weights, expected)
    assert plain(history) == plain(whole)
    assert history.best == whole.best
    assert equal(history.weights["model"], whole.weights["model"])


def test_a_finished_run_is_returned_at_once(tmp_path):
    first, expected = train(tmp_path)
    start = time.perf_counter()
    again, weights = train(tmp_path, resume=True, validate=lambda modules: 1 / 0)
    assert time.perf_counter() - start < 5
    assert equal(weights, expected)
    assert again.rows == first.rows


def kill_and_resume(folder, times):
    """Resume a run and kill it at random moments; return where each kill left it."""
    command = [sys.executable, games.__file__, "killed", str(folder), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_random_moments_it_ends_with_equal_weights(tmp_path):
    """24 times, robust training by `fit`: perturbations kept, running means, weights moved."""
    folder = tmp_path / "run"
    found = kill_and_resume(folder, 24)
    assert len(found) == 24
    assert len({tuple(place) for place in found}) > 8  # it came forward in between
    history, weights = games.long(folder)
    whole, expected = games.long()
    assert equal(weights, expected)
    assert plain(history) == plain(whole)


def test_between_two_renames_the_previous_checkpoint_counts(tmp_path):
    _, expected = train()
    with pytest.raises(Fall):
        train(tmp_path, progress=stop_at(7), save_every=0.0)
    (tmp_path / checkpoint.NAME).unlink()
    assert equal(train(tmp_path, resume=True)[1], expected)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken(tmp_path, damage):
    _, expected = train()
    with pytest.raises(Fall):
        train(tmp_path, progress=stop_at(7), save_every=0.0)
    path = tmp_path / checkpoint.NAME
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes({"flipped": content, "cut": content[:-40], "empty": b""}[damage])
    with pytest.raises(InputError, match=f"{path} is damaged"):
        checkpoint.read(path)
    with pytest.warns(RuntimeWarning, match="going on from"):
        assert equal(train(tmp_path, resume=True)[1], expected)
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(InputError, match="No older one"):
        train(tmp_path, resume=True)


def test_a_header_that_was_changed_is_damage(tmp_path):
    train(tmp_path, epochs=1)
    path = tmp_path / checkpoint.NAME
    content = path.read_bytes()
    changed = content.replace(rb"\"epoch\": 1", rb"\"epoch\": 0")
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(InputError, match="hash"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 4}, "epochs was 3, is 4"),
        ({"seed": 6}, "seed was 5, is 6"),
        ({"settings": {"eps": 0.2, "of": "x"}}, r"run \(settings.eps was 0.1, is 0.2\): ask"),
        ({"game": Noisy()}, r"optimizers.model.0 was \"Adam\", is \"SGD\".*; \d+ more\)"),
        (
            {"game": Noisy(**{**games.DEEP, "dropout": 0.3})},
            r"parts.3 was .Dropout.p=0.2.*, is .Dropout.p=0.3",
        ),
    ],
)
def test_another_run_is_refused(tmp_path, changes, said):
    settings = {"eps": 0.1, "of": "x"}
    train(tmp_path, settings=settings)
    with pytest.raises(InputError, match=said):
        train(tmp_path, resume=True, **{"settings": settings, **changes})


NEIGHBOUR = """
def doubled(x):
    return {neighbour} * x
"""
CODE = """
import neighbour
from torch import nn

SCALE = ({scale}, 1)
unused = {unused}

def helped(x, unused=1):
    return {helper} * neighbour.doubled(x) * SCALE[0] * unused

class Base(nn.Sequential):
    def forward(self, x):
        return super().forward({base} * x)

class Net(Base):
    def forward(self, x):
        # {comment}
        return super().forward({own} * helped(x))
"""
NUMBERS = dict.fromkeys(("own", "base", "helper", "neighbour", "scale", "unused", "comment"), 1)


def loaded(name, path, text, monkeypatch):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("changed", NUMBERS)
def test_a_network_with_other_code_is_refused(tmp_path, monkeypatch, changed):
    """Of equal shapes; what is only said differently, or not used, may go on."""

    def game(**numbers):
        place = tmp_path / str(sum(numbers.values()))
        place.mkdir()
        for name, text in (("neighbour", NEIGHBOUR), ("my_net", CODE)):
            made = loaded(name, place / f"{name}.py", text.format(**numbers), monkeypatch)
        return Plain(net=made.Net(*network()))

    given = {"epochs": 1, "batch_size": 8, "out": tmp_path / "run"}
    play(game(**NUMBERS), samples(), **given)
    again = game(**NUMBERS | {changed: 2})
    if changed in ("comment", "unused"):
        assert play(again, samples(), resume=True, **given).stopped == "finished"
    else:
        with pytest.raises(
            InputError, match=r"\(modules.model.parts.network was \"Net \w{8}\", is"
        ):
            play(again, samples(), resume=True, **given)


def test_other_data_is_refused(tmp_path):
    play(Plain(), samples(), epochs=1, batch_size=8, out=tmp_path)
    x, y = samples()
    with pytest.raises(InputError, match="data was"):
        play(Plain(), (x + 1, y), epochs=1, batch_size=8, out=tmp_path, resume=True)


def test_another_version_of_the_code_is_refused(tmp_path, monkeypatch):
    train(tmp_path)
    monkeypatch.setattr("robustlearn.__version__", "9.9")
    with pytest.raises(InputError, match=r"other code \(robustlearn was .* is .9\.9"):
        train(tmp_path, resume=True)


def test_a_run_is_not_overwritten(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(InputError, match="holds a run already"):
        train(tmp_path, epochs=1)


def test_a_checkpoint_is_read_without_unpickling(tmp_path):
    train(tmp_path, epochs=1)
    length = int.from_bytes((tmp_path / checkpoint.NAME).read_bytes()[:8], "little")
    header = json.loads((tmp_path / checkpoint.NAME).read_bytes()[8 : 8 + length])
    assert json.loads(header["__metadata__"]["header"])["version"]["torch"] == torch.__version__
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        checkpoint.PREVIOUS,
        checkpoint.NAME,
        "model.safetensors",
    ]


# ------------------------------------------------------------------ faults


def test_a_full_disk_names_the_path_and_leaves_the_last_checkpoint(tmp_path):
    _, expected = train()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(moment):
        if moment.epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(InputError, match=f"{tmp_path / checkpoint.NAME} could not be written"):
            train(tmp_path, progress=fill, save_every=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.tmp"))
    assert equal(train(tmp_path, resume=True)[1], expected)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run cannot be made"):
        train(tmp_path / "file" / "run")


def test_a_folder_that_cannot_be_written_to_is_named():
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root writes everywhere
        with pytest.raises(InputError, match=r"could not be written .Permission denied"):
            train(folder)
    finally:
        os.seteuid(user)
        folder.rmdir()


def spoil(*numbers):
    """Make the losses NaN at some steps."""
    return lambda losses, turn: losses * (math.nan if turn.number in numbers else 1.0)


def test_skip_leaves_the_update_out():
    spoiled = Plain(spoil(1))
    history = play(spoiled, samples(), epochs=1, batch_size=8)
    net = network()
    x, y = samples()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for index in spoiled.seen[:1] + spoiled.seen[2:]:
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    assert history.rows[0]["skipped"] == 1
    for name, value in net.state_dict().items():
        torch.testing.assert_close(spoiled.weights[name], value)


def test_a_batch_with_nan_does_not_stay_in_batch_norm():
    x, y = samples()
    x = x.clone()
    x[5] = math.nan
    game = Plain(net=network(norm=True))
    history = play(game, (x, y), epochs=2, batch_size=8, ema=0.5)
    assert [row["skipped"] for row in history.rows] == [1, 1]
    assert all(value.isfinite().all() for value in game.weights.values())
    assert all(value.isfinite().all() for value in history.weights["model"].values())


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_losses_that_are_not_finite_halve_the_rate(precision):
    """And leave the scale of fp16 losses alone, which no smaller scale would mend."""
    game = Plain(spoil(1))
    play(game, samples(), epochs=1, batch_size=8, on_nonfinite="halve", precision=precision)
    assert game.rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.05])


def test_halve_is_remembered(tmp_path):
    spoiled = Plain(spoil(1, 3))
    with pytest.raises(Fall):
        play(
            spoiled,
            samples(),
            epochs=2,
            batch_size=8,
            on_nonfinite="halve",
            out=tmp_path,
            save_every=0.0,
            progress=stop_at(5),
        )
    assert spoiled.rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])
    again = Plain()
    play(
        again,
        samples(),
        epochs=2,
        batch_size=8,
        on_nonfinite="halve",
        out=tmp_path,
        resume=True,
    )
    assert set(again.rates) == {0.025}


def steep(number):
    """Make the losses of one step finite with an infinite slope."""

    def change(losses, turn):
        return (0 * losses).sqrt() if turn.number == number else losses

    return change


@pytest.mark.parametrize("precision", ["float32", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_stop_saves_the_batch(tmp_path, accumulate, precision):
    game = Plain(spoil(2))
    given = {"accumulate": accumulate, "precision": precision}
    with pytest.raises(InputError, match=r"losses .* at step 2 \(its batch is in .*nonfinite-0"):
        play(game, samples(), epochs=1, batch_size=8, on_nonfinite="stop", out=tmp_path, **given)
    kept = load_file(tmp_path / "nonfinite-0.safetensors")
    assert kept["index"].tolist() == game.seen[2]
    assert torch.equal(kept["x"], samples()[0][kept["index"]])


def test_stop_saves_all_batches_that_may_be_to_blame(tmp_path):
    game = Plain(steep(1))
    given = {"accumulate": 3, "on_nonfinite": "stop", "out": tmp_path}
    with pytest.raises(InputError, match=r"gradient of 'model' .* steps 0, 1, 2 \(their batches"):
        play(game, samples(), epochs=1, batch_size=8, **given)
    kept = load_file(tmp_path / "nonfinite-0.safetensors")
    assert kept["index"].tolist() == list(itertools.chain(*game.seen[:3]))


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_an_epoch_without_a_finite_update_ends_the_run(precision):
    given = {"epochs": 3, "batch_size": 8, "precision": precision}
    with pytest.raises(InputError, match=r"no gradient of epoch 0 was finite \(5 updates"):
        play(Plain(lambda losses, turn: losses * math.nan), samples(), **given)


class Failing(Dataset):
    """Samples of which one cannot be read."""

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i == self.bad:
            raise OSError("no such image")
        x, y = samples()
        return x[i], y[i]


def test_data_that_raises_is_told_with_epoch_and_step(tmp_path):
    at = next(k for k, b in enumerate(Samples(Failing(None)).batches(0, 0, 8)) if 11 in b)
    said = f"^epoch 0, step {at}: the data raised OSError: no such image. Mend it"
    with pytest.raises(InputError, match=f"{said}$"):
        play(Plain(), Failing(11), epochs=2, batch_size=8)
    with pytest.raises(InputError, match=f"{said} and resume: the last checkpoint is whole$"):
        play(Plain(), Failing(11), epochs=2, batch_size=8, out=tmp_path, save_every=0.0)
    mended, whole = Plain(), Plain()
    play(mended, Failing(None), epochs=2, batch_size=8, out=tmp_path, resume=True)
    play(whole, samples(), epochs=2, batch_size=8)
    assert equal(mended.weights, whole.weights)


def test_data_that_raises_where_it_is_held_out_is_told():
    with pytest.raises(InputError, match="the data raised OSError: no such image"):
        Samples(Failing(11)).split(torch.arange(N))


def test_a_batch_of_one_with_batch_norm_is_told():
    with pytest.raises(InputError, match="larger batch_size"):
        play(Plain(net=network(norm=True)), samples(), epochs=1, batch_size=1)
    play(Plain(net=network(norm=True)), samples(), epochs=1, batch_size=N - 1)  # 19 and 18


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": None}, "batch_size"),
        ({"precision": "fp8"}, "precision is one of"),
        ({"schedule": "linear"}, "no schedule 'linear'"),
        ({"on_nonfinite": "cry"}, "on_nonfinite is one of"),
        ({"ema": 1.0}, "ema"),
        ({"clip": 0.0}, "clip"),
        ({"patience": 2}, "what validate finds: give that too"),
        ({"validate": lambda modules: {"a": 1.0}, "figure": "b"}, "no figure 'b'"),
        ({"trackers": ["abacus"]}, "not installed"),
        ({"resume": True}, "a folder: give that as out"),
    ],
)
def test_options_that_cannot_be(changes, said):
    with pytest.raises(InputError, match=said):
        play(Plain(), samples(), **{"epochs": 1, "batch_size": 8, **changes})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda losses, turn: losses.mean(), "one loss per sample"),
        (lambda losses, turn: turn.update("model") or losses, "no gradient reached"),
        (lambda losses, turn: turn.module("critic"), "no module 'critic'"),
    ],
)
def test_a_step_that_cannot_be(change, said):
    with pytest.raises(InputError, match=said):
        play(Plain(change), samples(), epochs=1, batch_size=8)


# ------------------------------------------------------------------ devices


def test_on_another_device_weights_are_those_of_the_cpu(tmp_path):
    """On a device that computes, but does not mix with the CPU; stopped and resumed there."""
    command = [sys.executable, games.__file__, "faked", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found")
    for case in games.FAKED:
        assert equal(found[case, "there"], found[case, "cpu"]), case
        assert found[case, "there rows"] == found[case, "cpu rows"]
        batches = 16 if case == "pinned" else 0  # 15, one of them begun again after the stop
        assert found[case, "late"] == 2 * batches, case


# ------------------------------------------------------------------ trackers


def test_trackers_hear_every_epoch():
    listener = games.Listener()
    settings = {"threat": "small", "ramp": 0.5, "epochs": 99}
    history, _ = train(trackers=[listener], settings=settings)
    expected = {"epochs": 3, "seed": 5, "threat": "small", "ramp": 0.5}
    assert {name: listener.asked[name] for name in expected} == expected
    assert [step for step, _ in listener.heard] == [0, 1, 2]
    assert listener.heard[2][1]["metrics/loss"] == history.rows[2]["metrics"]["loss"]
    assert listener.ended


@pytest.mark.parametrize("name", ["play", "randomness", "samples", "schedules"])
def test_the_examples_of_the_docstrings(name):
    module = importlib.import_module(f"robustlearn.loop.{name}")
    assert doctest.testmod(sys.modules[module.__name__], raise_on_error=True).attempted


def test_ranks_of_one_process_do_nothing():
    ranks, value = Ranks(), torch.ones(3)
    assert ranks.world == 1
    assert ranks.sum(value) is value
    assert ranks.told("x") == "x"
