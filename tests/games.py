"""Small games for the tests of the loop, importable by processes that the tests start."""

import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.nn import functional as F

import robustlearn as rl
from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.loop import checkpoint, play, sharded
from robustlearn.threats import LpBall
from robustlearn.train.game import RobustGame

N, D, CLASSES = 37, 6, 3


def samples(n=N):
    source = torch.Generator().manual_seed(1)
    x = torch.randn(n, D, generator=source)
    return x, (x @ torch.randn(D, CLASSES, generator=source)).argmax(1)


def network(*, norm=False, dropout=0.0):
    """Return a network whose weights differ from process to process, as unseeded ones do."""
    with torch.random.fork_rng([], device_type="cpu"):
        torch.manual_seed(3 + int(os.environ.get("RANK", "0")))
        middle = [nn.BatchNorm1d(8)] if norm else []
        return nn.Sequential(
            nn.Linear(D, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES)
        )


class Listener(GeneralTracker):
    """A tracker that notes what it hears."""

    name, requires_logging_directory, main_process_only = "listener", False, True
    tracker, ended = None, False

    def __init__(self):
        super().__init__()
        self.heard = []

    def store_init_configuration(self, values):
        self.asked = values

    def log(self, values, step=None, **_):
        self.heard.append((step, values))

    def finish(self):
        self.ended = True


class Noisy:
    """Cross-entropy at points with noise that each sample keeps from epoch to epoch."""

    def __init__(self, *, norm=False, dropout=0.0, optimizer=None, n=N, memory=True):
        self.modules = {"model": network(norm=norm, dropout=dropout)}
        parameters = self.modules["model"].parameters()
        self.optimizers = {
            "model": (optimizer or torch.optim.SGD)(parameters, lr=0.1, **self.extras(optimizer))
        }
        self.memory = torch.zeros(n, D)
        self.batches = []

    @staticmethod
    def extras(optimizer):
        return {} if optimizer else {"momentum": 0.9}

    def step(self, batch, turn):
        noise = 0.1 * _tensor.normal(turn.keys, (D,), batch.x.dtype)
        self.memory = self.memory.to(batch.x.device)
        noise = noise + 0.5 * self.memory[batch.index]
        self.memory[turn.gather(batch.index)] = turn.gather(noise)
        self.batches.append(batch.index.tolist())
        with turn.autocast():
            logits = turn.module("model")(batch.x + noise)
        losses = F.cross_entropy(logits.float(), batch.y, reduction="none")
        turn.backward(losses)
        turn.update("model")
        return {"loss": losses, "right": (logits.argmax(1) == batch.y).float()}

    def state(self):
        return {"memory": self.memory}

    def load(self, state):
        self.memory = state["memory"]


def score(modules):
    x, y = samples()
    device = next(modules["model"].parameters()).device
    with torch.no_grad():
        right = modules["model"](x.to(device)).argmax(1).cpu() == y
    return {"accuracy": float(right.float().mean())}


OPTIONS = {"epochs": 3, "batch_size": 8, "seed": 5, "ema": 0.9, "schedule": "cosine"}


def train(out=None, game=None, **changes):
    """Return the history and the final weights of a run with everything that has a state."""
    game = game or Noisy(**DEEP)
    given = {**OPTIONS, "validate": score, **changes}
    history = play(game, samples(), out=out, **given)
    return history, {k: v.clone() for k, v in game.modules["model"].state_dict().items()}


class Duel:
    """Two sides, of which one passes the exchange of gradients through the other."""

    def __init__(self):
        self.modules = {"critic": network(), "generator": nn.Linear(2, D)}
        with torch.no_grad():
            self.modules["generator"].weight.fill_(0.1)
            self.modules["generator"].bias.zero_()
        self.optimizers = {
            name: torch.optim.Adam(module.parameters(), 1e-2)
            for name, module in self.modules.items()
        }

    def step(self, batch, turn):
        z = _tensor.normal(turn.keys, (2,), batch.x.dtype)
        critic = turn.module("critic")
        real, fake = critic(batch.x)[:, 0], critic(turn.unwrapped("generator")(z).detach())[:, 0]
        losses = F.softplus(-real) + F.softplus(fake)
        turn.backward(losses)
        turn.update("critic")
        judge = turn.unwrapped("critic").requires_grad_(False)
        deceits = F.softplus(-judge(turn.module("generator")(z))[:, 0])
        turn.backward(deceits)
        turn.update("generator")
        judge.requires_grad_(True)
        return {"critic": losses, "generator": deceits}


def duel():
    """Return the weights of both sides after a duel."""
    history = play(Duel(), samples()[0], epochs=3, batch_size=8, timeout=60)
    return {f"{n}.{k}": v for n, side in history.weights.items() for k, v in side.items()}


def robust(awp=0.0, **options):
    """Return the weights after training against an adversary, who may move weights too."""
    net = network()
    optimizers = {"model": torch.optim.SGD(net.parameters(), 0.2)}
    ball = LpBall(2, 0.3)
    game = RobustGame({"model": net}, optimizers, "pgd_at", {"steps": 2}, ball, awp=awp)
    history = play(game, samples(), epochs=3, batch_size=8, timeout=60, **options)
    assert history.weights["model"].keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in history.weights["model"].items())
    return history.weights["model"]


CASES = {
    "unequal parts": {"batch_size": 8},
    "fewer samples than processes": {"batch_size": 1, "epochs": 1},
    "accumulated": {"batch_size": 8, "accumulate": 2, "clip": 0.1},
    "patience": {"batch_size": 16, "epochs": 6, "patience": 1, "seed": 2},
}
DEEP = {"norm": True, "dropout": 0.2, "optimizer": torch.optim.Adam}


class Stopping(Noisy):
    """A game that stops in every process in its second epoch."""

    def step(self, batch, turn):
        if turn.number == 8:
            raise KeyboardInterrupt
        return super().step(batch, turn)


def ranks(folder):
    """Train some games as one process of many; the last one whole, and stopped and resumed."""
    found = {}
    for case, options in CASES.items():
        history, weights = train(game=Noisy(), timeout=60, **options)
        found[case] = {"weights": weights, "rows": plain(history)}
        found[case] |= {"best": history.best, "stopped": history.stopped}
        found[case]["kept"] = history.weights["model"]
    found["duel"], found["perturbed"] = duel(), robust(awp=0.3)
    history, found["whole"] = train(game=Noisy(**DEEP))
    found["whole rows"] = plain(history)
    with contextlib.suppress(KeyboardInterrupt):
        train(folder / "run", game=Stopping(**DEEP), save_every=0.0)
    history, found["resumed"] = train(folder / "run", game=Noisy(**DEEP), resume=True)
    found["resumed rows"] = plain(history)
    torch.save(found, folder / f"rank{os.environ['RANK']}")


def fitted(**options):
    """Return the weights of a network that `fit` has trained, validated and evaluated."""
    net = network()
    given = {"epochs": 3, "batch_size": 8, "attacks": "fgsm", "on_overfitting": "rollback"}
    result = rl.fit(net, samples(), LpBall(2, 0.3), validation=0.2, **given, **options)
    assert len(result.report.samples) == N // 10  # the half that did not choose the epoch
    return {name: value.clone() for name, value in net.state_dict().items()}


class Measured(Noisy):
    """A game that notes how many numbers of its weights are in this process."""

    def step(self, batch, turn):
        self.held = sum(sharded.local(p).numel() for p in self.modules["model"].parameters())
        return super().step(batch, turn)


def parts(folder):
    """Train with a part of each weight in each process, blocks gathered one by one."""
    sharded.LARGE = 10
    found = {"robust": robust(shard=True), "fitted": fitted(shard=True)}
    for case, options in CASES.items():
        history, weights = train(game=Noisy(), timeout=60, shard=True, **options)
        found[case] = {"weights": weights, "rows": plain(history)}
        found[case] |= {"best": history.best, "stopped": history.stopped}
        found[case]["kept"] = history.weights["model"]
    game = Measured(**DEEP)
    _, found["whole"] = train(game=game, shard=True)
    found["held"] = game.held
    with contextlib.suppress(KeyboardInterrupt):
        train(folder / "run", game=Stopping(**DEEP), save_every=0.0, shard=True)
    _, found["resumed"] = train(folder / "run", game=Noisy(**DEEP), resume=True, shard=True)
    for refused in ({"compile": True}, {"channels_last": True}):
        with contextlib.suppress(InputError):
            train(game=Noisy(), shard=True, **refused)
            raise AssertionError(refused)
    try:
        robust(awp=0.3, shard=True)
    except InputError as error:
        found["awp"] = str(error)
    torch.save(found, folder / f"rank{os.environ['RANK']}")


class Dying(Noisy):
    """A game that one process leaves."""

    def step(self, batch, turn):
        if turn.number == 3 and os.environ["RANK"] == "1":
            raise RuntimeError("rank 1 is no more")
        return super().step(batch, turn)


class Unwrapped(Noisy):
    """A game that computes its losses past the exchange of gradients."""

    def step(self, batch, turn):
        losses = F.cross_entropy(self.modules["model"](batch.x), batch.y, reduction="none")
        turn.backward(losses)
        turn.update("model")
        return {}


def spoiled(folder):
    """Train on data of which one sample is NaN, until that stops all processes."""
    x, y = samples()
    x[5] = math.nan
    given = {"batch_size": 8, "accumulate": 2, "on_nonfinite": "stop", "timeout": 30}
    play(Noisy(), (x, y), epochs=1, out=folder, **given)


def failing(folder):
    """Note what is said of gradients that were not exchanged or are NaN; then one process dies."""
    try:
        spoiled(folder / "spoiled")
    except InputError as error:
        (folder / f"spoiled{os.environ['RANK']}").write_text(str(error))
    try:
        train(game=Unwrapped(), timeout=30)
    except InputError as error:
        (folder / f"rank{os.environ['RANK']}").write_text(str(error))
    train(game=Dying())


def plain(history):
    """Rows without what differs from run to run."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def long(out=None):
    """Return the history and the weights of a training with all that is remembered, resumed."""
    net = network(norm=True, dropout=0.2)
    given = {"epochs": 60, "batch_size": 8, "ema": 0.9, "save_every": 0.0, "seed": 5}
    given |= {"validation": None, "attacks": None, "awp": 0.01}
    result = rl.fit(net, samples(), LpBall(2, 0.3), out=out, resume=out is not None, **given)
    return result.history, {k: v.clone() for k, v in net.state_dict().items()}


def kill_at_random(folder, times):
    """Resume a run ``times`` times, each time killed from outside at a random moment.

    All that is waited comes to less than the run itself takes, however busy the machine is.

    This process has imported everything that is imported late, so that a fork starts at once.
    """
    long()
    start = time.perf_counter()
    long()
    longest = 1.7 * (time.perf_counter() - start) / times
    moments, found = random.Random(times), []
    while len(found) < times:
        child = os.fork()
        if child == 0:
            long(folder)
            os._exit(0)
        time.sleep(moments.uniform(0.01, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break  # the run was over before
        position = checkpoint.newest(folder)[1]["position"] if checkpoint.exists(folder) else {}
        found.append([position.get("epoch"), position.get("step")])
    return found


FAKED = {
    "batch norm, average, memory": {},
    "accumulated and clipped": {"accumulate": 2, "clip": 0.1},
    "bf16": {"precision": "bf16"},
    "pinned": {"pin_memory": True},
}


def faked(folder):
    """Train on the CPU and on a stand-in for an accelerator, resumed half-way; tell the results."""
    from fake_device import LATE, NAME, fake_device

    found = {}
    for case, options in FAKED.items():
        plainly = {} if "precision" in options else options  # the stand-in's autocast casts nothing
        history, found[case, "cpu"] = train(game=Noisy(**DEEP), **plainly)
        found[case, "cpu rows"] = plain(history)
    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    with fake_device():
        for case, options in FAKED.items():
            out = folder / case
            LATE.clear()
            with contextlib.suppress(KeyboardInterrupt):
                train(out, game=Stopping(**DEEP), save_every=0.0, **options)
            game = Noisy(**DEEP)
            history, weights = train(out, game=game, resume=True, **options)
            assert {value.device.type for value in weights.values()} == {NAME}
            found[case, "there"] = {name: value.cpu() for name, value in weights.items()}
            found[case, "there rows"], found[case, "late"] = plain(history), len(LATE)
    torch.save(found, folder / "found")


SCRIPTS = {"faked": faked, "ranks": ranks, "parts": parts, "failing": failing}

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder, *rest = sys.argv[1:]
    if name == "killed":
        print(json.dumps(kill_at_random(Path(folder), int(rest[0]))))
    else:
        SCRIPTS[name](Path(folder))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
