"""`evaluate`: attacks in order of cost on what still stands, then both bounds per sample."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn import losses
from robustlearn._progress import WHOLE, stages
from robustlearn.attacks import ATTACKS, unsuitable
from robustlearn.certify import Certificate
from robustlearn.certify import certify as prove
from robustlearn.errors import InputError
from robustlearn.evaluate import draws, fingerprint, inputs
from robustlearn.evaluate.detectors import told_apart
from robustlearn.evaluate.harness import Harness, Progress, Tally, attacked
from robustlearn.evaluate.judgement import Judgement
from robustlearn.evaluate.knowledge import Knowledge
from robustlearn.evaluate.plans import HALVINGS, PRESETS, SHARES, Budget, Step, plan, widened
from robustlearn.evaluate.results import AttackRun, Audit, Report
from robustlearn.evaluate.sharing import Shares
from robustlearn.evaluate.state import State
from robustlearn.models import labels as labels_of
from robustlearn.models import wrap
from robustlearn.models.estimators import detects
from robustlearn.threats import LpBall

FEW = 8  # samples that are all near the boundary
AUDITED = 64  # samples of an audit; twice as many or fewer are all attacked


def evaluate(
    model: Any,
    x: Any,
    y: Any,
    threat: LpBall,
    *,
    attacks: str | Sequence[Any] = "standard",
    certify: str = "auto",
    budget: Budget | str | None = None,
    nearest: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    device: Any = None,
    progress: Progress | bool | None = None,
    resume: str | Path | None = None,
    data: str = "data",
    classes: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
) -> Report:
    """Bound the robustness of a model from both sides.

    certified ≤ share of samples that no member of the threat breaks ≤ attacked (for a regressor:
    attacked ≤ mean worst squared error ≤ certified).

    In processes started by ``torchrun`` or ``accelerate launch`` each attacks a part of the
    samples. All must call this, with equal data; all return the report of one process, up to
    rounding, and the first alone calls ``progress`` and, in `Report.save`, writes.

    Parameters
    ----------
    model : a `Model`, or anything that `robustlearn.wrap` takes.
    x, y : samples (n, *shape) and labels or targets (n,): arrays, tensors or data frames. x is
        taken to the dtype of the model first; distances are from there.
    threat : what the adversary may do.
    attacks : ``"quick"``, ``"standard"``, ``"thorough"``, ``"autoattack"`` (the protocol of
        AutoAttack), names, or (name, options) pairs; in this order, each on the samples that
        still stand. A step may keep to those near the boundary, or to an audit of a random few;
        an audit that breaks one goes on with all, and the report bounds what it left undone.
        Samples that are certified are attacked once, as a check of the certificate. Where p is
        not 1, 2 or ∞, presets end with what takes any norm: `fgsm` and `deepfool`.
    certify : ``"auto"``, a method, or ``"none"``. On a network ``"auto"`` is intervals, and CROWN
        where it costs a sample no more than a few times what the attacks do;
        ``"auto:seconds=10"`` decides what that many seconds a sample, in the mean, suffice for.
        What is then neither certified nor falsified is open.
    budget : the most gradients and forward passes a sample, ``"gradients=60,forwards=500"``;
        attacks are shortened to fit, or left out, and the report says which. What it takes to
        measure their points again, and the verdict on at most 64 samples, come on top.
    nearest : run minimal-norm attacks on broken samples too, so that the curve of accuracy below
        ε is that of nearest points, not of points that were drawn back towards x.
    seed : of the random starts. Results do not depend on the batch that a sample travels in.
    batch_size : samples sent together; halved when the memory does not suffice.
    device : ``"auto"`` for an accelerator if there is one, a torch device, or None for where
        the model is. A torch module is moved back afterwards.
    progress : True for bars, or what is called as ``progress(stage, done, total)``; the stage
        ``"evaluation"`` is all of it, in passes through the model as they are expected.
    resume : folder in which finished batches and all adversarial points are kept; an evaluation
        that was interrupted goes on from there.
    data, classes, feature_names : what to call things in the report.
    indices : numbers of the samples in the data set that they come from; by default 0 … n−1.
        The random starts of a sample depend on its number and the seed alone.

    Returns
    -------
    A `Report`. Every success was measured again outside the attack, in a batch of another size,
    and its distance and box were checked in float64.

    Raises
    ------
    InputError for input that cannot be used, and where a preset has no attack for the model and
    the threat; AttackError and ContradictionError for a fault of
    an attack or a certificate.

    Examples
    --------
    >>> import robustlearn as rl
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> x, y = load_iris(return_X_y=True)
    >>> report = rl.evaluate(LogisticRegression().fit(x, y), x, y, rl.LpBall(2, 0.3))
    >>> report.certified.value == report.attacked.value < report.clean.value
    True
    """
    model = wrap(model)
    names = tuple(feature_names) if feature_names is not None else inputs.columns(x)
    points = inputs.points(x, threat)
    explicit = not (isinstance(attacks, str) and attacks in PRESETS)
    steps = plan(attacks) if explicit else widened(plan(attacks), threat.p)
    limits, seed = Budget.of(budget), inputs.seed(seed)
    numbers = inputs.numbers(indices, len(points))
    shares = Shares()
    with model.on(device), stages(progress if shares.rank == 0 else None) as told:
        points = threat.cast(points, model.dtype)
        labels = labels_of(model, points, y)
        size = max(1, batch_size)
        harness = Harness(model, points, labels, threat, numbers, size, seed, told, shares)
        return _Evaluation(
            harness,
            steps,
            certify,
            limits,
            resume,
            nearest=nearest,
            explicit=explicit,
        ).report(data, classes, names)


class _Evaluation:
    """The attacks of a plan, one after the other, on what each of them is for."""

    def __init__(
        self,
        harness: Harness,
        steps: list[Step],
        certify: str,
        budget: Budget,
        resume: str | Path | None,
        nearest: bool,
        explicit: bool,
    ) -> None:
        self.harness, self.steps, self.method = harness, steps, certify
        self.model, self.threat = harness.model, harness.threat
        self.x, self.y = harness.x, harness.y
        self.explicit, self.budget, self.nearest = explicit, budget, nearest
        self.spent = Budget(0, 0)
        self.climbed = False  # whether an attack by gradient has run
        self.notes: list[str] = []
        self.broke: dict[str, Tensor] = {}
        self.known = Knowledge(harness)
        self.judgement = Judgement(harness, self.known)
        features = math.prod(self.x.shape[1:])
        halvings = HALVINGS if self.threat.p else features.bit_length()
        self.sizes = (int(self.model.num_classes or 2), halvings)  # what a step's cost depends on
        self.state = None
        if resume is not None:
            folder, asked, shares = Path(resume), self._question(), harness.shares
            behaviour = fingerprint.behaviour(harness, self.known.clean)
            self.state = shares.in_turn(
                lambda: State(folder, asked, behaviour, shares.rank, shares.world)
            )

    def report(
        self, data: str, classes: Sequence[str] | None, names: tuple[str, ...] | None
    ) -> Report:
        """Run everything and put it together."""
        self._look_at_the_output()
        certificate, about = self._certify()
        fault = self.harness.shares.told(self.judgement.unusable())
        self.proven = torch.zeros(len(self.x), dtype=torch.bool)
        if certificate is not None and certificate.certified is not None:
            self.proven = torch.from_numpy(certificate.certified)
        steps = self.steps
        if not self.explicit and self.model.task == "classification":
            steps = [step.defined(self.sizes[0]) for step in steps]
        self._check_that_one_fits(steps, fault)
        runs = self._attacks(steps, fault)
        if certificate is not None and certificate.witness is not None:
            runs += self._witnessed(certificate)
        self.known.shrink()
        certificate = self.known.check(certificate)
        told = self.harness.shares.told
        verdict = told(self.judgement.verdict(self.broke, certificate))
        predictions = self.known.predictions()
        samples = self.known.samples(certificate, predictions)
        notes = [*self.model.notes, *self.judgement.notes, *self.notes]
        if detects(self.model.source):
            notes += told_apart(samples, certified=certificate is not None)
        if certificate is not None and certificate.alpha > 0:
            notes.append(
                f"what {certificate.method} says of a sample is not proven: it is wrong with "
                f"probability at most {certificate.alpha:g}"
            )
        found, proven = self.known.totals(certificate)
        if proven is not None and self.model.task == "classification":
            about["open"] = found.value - proven.value
        columns = self.model.classes
        named = columns if classes is None else classes
        if columns is not None and columns.tolist() != list(range(len(columns))):
            named = None  # labels are shown as they are
        return Report(
            model=self.model.name,
            data=data,
            task=str(self.model.task),
            threat={**self.threat.describe(), "text": str(self.threat)},
            clean=self.known.estimate(self.known.right, self.known.value),
            attacked=found,
            certified=proven,
            certificate=about,
            samples=samples,
            attacks=tuple(runs),
            verdict=verdict,
            notes=tuple(dict.fromkeys(told(notes))),
            seed=self.harness.seed,
            environment=told(inputs.environment(self.model)),
            x=self.x.numpy(),
            x_adv=self.known.x_adv.numpy(),
            predictions=predictions,
            classes=None if named is None else tuple(str(name) for name in named),
            feature_names=names,
        )

    # ------------------------------------------------------------------ before the attacks

    def _question(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.x.numpy().tobytes() + self.y.numpy().tobytes())
        return {
            "data": digest.hexdigest(),
            "model": fingerprint.identity(self.model),
            "threat": self.threat.describe(),
            "samples": self.harness.numbers.tolist(),
            "attacks": [step.label for step in self.steps],
            "budget": [self.budget.gradients, self.budget.forwards],
            "certify": self.method,
            "nearest": self.nearest,
            "seed": self.harness.seed,
        }

    def _look_at_the_output(self) -> None:
        if len(self.x) > 1 and bool((self.known.clean == self.known.clean[:1]).all()):
            self.notes.append("the model gives the same output for every sample")

    def _certify(self) -> tuple[Certificate | None, dict[str, Any]]:
        about: dict[str, Any] = {"method": None, "exact": None, "reason": None, "open": None}
        if self.method == "none":
            return None, about | {"reason": "not asked for"}
        self.harness.progress("certificate", 0, len(self.x))
        labels, passes = self.known.named(self.y.numpy()), self._passes()

        def proved(rows: Tensor) -> Certificate:
            return prove(
                self.model,
                self.x[rows],
                self.threat.select(rows),
                y=labels[rows.numpy()],
                method=self.method,
                passes=passes,
            )

        try:
            parts = self.harness.shares.divided(len(self.x), proved)
        except InputError as error:
            if self.method.partition(":")[0] != "auto":
                raise
            return None, about | {"reason": f"no certificate applies: {error}"}
        finally:
            self.harness.progress("certificate", len(self.x), len(self.x))
        certificate = Certificate.joined([(rows.numpy(), part) for rows, part in parts])
        return certificate, about | {"method": certificate.method, "exact": certificate.exact}

    def _witnessed(self, certificate: Certificate) -> list[AttackRun]:
        """Break what still stands by the witnesses that the certificate came upon."""
        found = torch.from_numpy(certificate.status == "falsified") & self.known.standing
        rows = found.nonzero().squeeze(1)
        if len(rows) == 0:
            return []
        points = torch.as_tensor(certificate.witness)[rows].to(self.x.dtype)
        tally, before = Tally(), self.known.standing.clone()
        self.known.keep(rows, points, tally)
        self.known.settle(certificate.method, rows, before)
        broken = int((~self.known.standing[rows]).sum())
        name = certificate.method
        return [AttackRun(name, attempted=len(rows), broken=broken, unstable=tally.unstable)]

    # ------------------------------------------------------------------ attacks

    def _attacks(self, steps: Sequence[Step], fault: str | None) -> list[AttackRun]:
        """Run the steps; tell how much of their likely cost is behind."""
        costs = [self._likely(step) for step in steps]
        runs: list[AttackRun] = []
        for number, step in enumerate(steps):
            self.harness.progress(WHOLE, sum(costs[:number]), sum(costs))
            runs.append(self._attack(step, fault))
        self.harness.progress(WHOLE, sum(costs), sum(costs))
        return runs

    def _likely(self, step: Step) -> int:
        """Return the passes that a step takes if all samples stand and no gradient is masked."""
        if step.scope == "masked" or self._unfit(step, None) is not None:
            return 0
        audited = min(1.0, AUDITED / len(self.x)) if step.scope == "audit" else 1.0
        return math.ceil(len(self.x) * audited * self._paid(step))

    def _passes(self) -> int:
        """Return the passes of a sample through the plan, audits and suspicions apart."""
        fit = [step for step in self.steps if self._unfit(step, None) is None]
        return math.ceil(sum(self._paid(s) for s in fit if s.scope not in ("audit", "masked")))

    def _paid(self, step: Step) -> float:
        """Return the passes that a step takes of each sample in the mean, if all of them stand."""
        cost = step.cost(*self.sizes)
        return SHARES.get(step.scope, 1.0) * (2 * (cost.gradients or 0) + (cost.forwards or 0))

    def _attack(self, step: Step, fault: str | None) -> AttackRun:
        reason = self._unfit(step, fault)
        if reason is not None and self.explicit:
            raise InputError(reason)
        if reason is not None:
            return AttackRun(step.label, skipped=reason)
        rows = self._chosen(step)
        if step.scope == "masked" and len(rows) and not self._masked():
            return AttackRun(step.label, skipped="the gradients show no sign of masking")
        affordable = self.budget.less(self.spent).trimmed(step, *self.sizes)
        if affordable is None:
            if len(rows):
                self.notes.append(f"the budget {self.budget} leaves nothing for {step.label}")
            return AttackRun(step.label, skipped=f"the budget is spent: {self.budget}")
        if affordable.label in self.broke:
            return AttackRun(step.label, skipped="the same attack has run already")
        if affordable.label != step.label:
            self.notes.append(
                f"the budget {self.budget} shortens {step.label} to {affordable.label}"
            )
        standing = self.known.standing.clone()
        if len(rows):
            self.spent = self.spent.plus(affordable.cost(*self.sizes))
        tally = Tally()
        self._run(affordable, affordable.label, rows, tally)
        rest = self._rest(affordable, rows)
        if len(rest) and bool((standing & ~self.known.standing).any()):
            self._run(affordable, f"{affordable.label}-rest", rest, tally)
            rows, rest = torch.cat([rows, rest]), rest[:0]
        self.climbed |= step.needs == "gradient"
        tally = tally.of_all(self.harness.shares)
        broken = standing & ~self.known.standing
        if len(rows):
            self.broke[affordable.label] = broken
        return AttackRun(
            affordable.label,
            attempted=len(rows),
            broken=int(broken.sum()),
            unstable=tally.unstable,
            forwards=tally.forwards,
            backwards=tally.backwards,
            seconds=tally.seconds,
            audit=self._audit(affordable, rows, rest) if len(rest) else None,
        )

    def _check_that_one_fits(self, steps: list[Step], fault: str | None) -> None:
        """Raise an InputError where a preset has no attack for the model and the threat."""
        reasons = [self._unfit(step, fault) for step in steps]
        if None not in reasons:
            told = "; ".join(dict.fromkeys(str(reason) for reason in reasons))
            raise InputError(
                f"the preset has no attack for this model and {self.threat}: {told}. Name attacks "
                "that take it, or choose p = 1, 2 or inf"
            )

    def _unfit(self, step: Step, fault: str | None) -> str | None:
        """Say why an attack cannot run."""
        reason = unsuitable(step.name, self.model, self.threat, tuple(self.x.shape[1:]))
        if reason is None and fault is not None and step.needs == "gradient":
            reason = fault
        loss = losses.LOSSES.get(step.options.get("loss", ""))
        if loss is not None and loss.task != self.model.task:
            reason = f"{loss.name} is a loss for {loss.task}"
        return reason

    def _run(self, step: Step, stage: str, rows: Tensor, tally: Tally) -> None:
        if len(rows) == 0:
            return
        function, before = ATTACKS[step.name].function, self.known.standing.clone()
        for batch, x_adv in attacked(
            self.harness, stage, function, step.options, rows, self.state, tally
        ):
            self.known.keep(batch, x_adv, tally)
        self.known.settle(step.label, rows, before)

    def _chosen(self, step: Step) -> Tensor:
        """Return the samples that a step works on: what stands, and of that its scope."""
        every = self.nearest and ATTACKS[step.name].facts["minimal"]
        standing = self.known.right if every else self.known.standing
        if self.broke:  # one attack has met the certified samples, and none can break them
            standing = standing & ~self.proven
        rows = standing.nonzero().squeeze(1)
        if not every and step.scope in SHARES and len(rows) > FEW:
            order = self.known.reserve()[rows].argsort()
            return rows[order[: math.ceil(SHARES[step.scope] * len(rows))]].sort().values
        if every or self.model.task != "classification":
            return rows
        if step.scope == "audit" and len(rows) > 2 * AUDITED and not self._masked():
            order = draws.shuffled(self.harness.seed, self.harness.numbers[rows])
            return rows[order[:AUDITED]].sort().values
        return rows

    def _rest(self, step: Step, rows: Tensor) -> Tensor:
        """Return the samples that an audit has left out."""
        if step.scope != "audit" or self.model.task != "classification":
            return rows[:0]
        left = self.known.standing & ~self.proven
        left[rows] = False
        return left.nonzero().squeeze(1)

    def _audit(self, step: Step, rows: Tensor, rest: Tensor) -> Audit:
        cost = step.cost(*self.sizes)
        effort = f"{cost.gradients} gradients" if cost.gradients else f"{cost.forwards} queries"
        return Audit(tried=len(rows), left=len(rest), effort=effort)

    def _masked(self) -> bool:
        """Tell whether black-box attacks must run in full: gradients are missing or suspicious."""
        if not self.climbed:
            return True
        return self.harness.shares.told(self.judgement.masked(self.broke))
