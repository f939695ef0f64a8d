"""What is known about every sample while attacks run, and what is told of it at the end."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn._tensor import per_sample
from robustlearn.certify import Certificate
from robustlearn.errors import ContradictionError
from robustlearn.evaluate import inputs
from robustlearn.evaluate.harness import Harness, Tally
from robustlearn.evaluate.results import Estimate, Sample

SHRINKS = 8  # halvings of the segment from a sample to its adversarial example
NEARER = 1e-9  # relative: what the rounding of two distances does not explain


class Knowledge:
    """The clean output, the worst point found so far, and who broke what; one row a sample.

    Attributes
    ----------
    clean : outputs at x; value : their margin (n,), or squared error; right : (n,) bool.
    x_adv : (n, *shape) the point that counts; worst : (n,) its margin or squared error.
    standing : (n,) bool, right and unbroken; broken_by : the attack that broke it.
    """

    def __init__(self, harness: Harness) -> None:
        self.harness, self.model, self.threat = harness, harness.model, harness.threat
        self.x, self.y = harness.x, harness.y
        clean = harness.shared("clean", self.x)
        self.clean = inputs.finite(self.model, clean)
        self.value = harness.loss(self.clean, self.y)
        self.worst = self.value.clone()
        self.right = ~harness.loss.broken(self.clean, self.y)
        self.x_adv = self.x.clone()
        self.broken_by: list[str | None] = [None] * len(self.x)
        self.standing = self.right.clone()

    def keep(self, rows: Tensor, x_adv: Tensor, tally: Tally) -> None:
        """Take points that break a sample, that are worse, or nearer than those that broke it."""
        value, broken, unstable = self.harness.measured(rows, x_adv)
        tally.unstable += unstable
        if self.model.task == "classification":
            stood = self.standing[rows]
            nearer = broken & ~stood & self._nearer(rows, x_adv)
            broken &= stood
            lower = stood & (value < self.worst[rows]) & ~(value < 0)
            better = broken | nearer | lower
            self.standing[rows[broken]] = False
            value = torch.minimum(value, self.worst[rows])  # a nearer point may be less wrong
        else:
            better = value > self.worst[rows]
        self.worst[rows[better]] = value[better]
        self.x_adv[rows[better]] = x_adv[better]

    def settle(self, label: str, rows: Tensor, before: Tensor) -> None:
        """End a stage on some samples: learn what the other processes found, and name the attack.

        Parameters
        ----------
        before : (n,) bool, what stood when the stage began.
        """
        self.harness.shares.exchange(rows, self.worst, self.x_adv, self.standing)
        for row in (before & ~self.standing).nonzero().squeeze(1).tolist():
            self.broken_by[row] = label

    def reserve(self) -> Tensor:
        """Return a number (n,) that is the smaller the more a sample promises to further attacks.

        What is left of the margin over what attacks took of it; of a regressor's sample, minus
        the gain in loss: most of the mean worst loss is where it has grown most.
        """
        way = self.value - self.worst
        if self.model.task != "classification":
            return way
        return self.worst / way.clamp_min(torch.finfo(way.dtype).tiny)

    def _nearer(self, rows: Tensor, points: Tensor) -> Tensor:
        """Tell where points are nearer to their samples than what is kept."""
        x = self.x[rows].double()
        kept, found = (self.threat.norm(p.double() - x) for p in (self.x_adv[rows], points))
        return found < kept

    def shrink(self) -> None:
        """Bisect from each sample to its adversarial example for a nearer one.

        Points between are members of a convex threat; every one that counts is measured twice.
        """
        if self.model.task != "classification":
            return
        broken = (self.right & ~self.standing).nonzero().squeeze(1)
        self._shrink(self.harness.shares.own(broken))
        self.harness.shares.exchange(broken, self.worst, self.x_adv)

    def _shrink(self, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        x, delta = self.x[rows], self.x_adv[rows] - self.x[rows]
        threat = self.threat.select(rows)
        low, high = torch.zeros(len(rows), dtype=x.dtype), torch.ones(len(rows), dtype=x.dtype)
        for _ in range(SHRINKS):
            middle = (low + high) / 2
            point = threat.restrict(x, delta * per_sample(middle, x))
            value, broken, _ = self.harness.measured(rows, point)
            broken &= threat.contains(x, point)
            self.x_adv[rows[broken]] = point[broken]
            self.worst[rows[broken]] = torch.minimum(self.worst[rows], value)[broken]
            low, high = torch.where(broken, low, middle), torch.where(broken, middle, high)

    def check(self, certificate: Certificate | None) -> Certificate | None:
        """Raise a ContradictionError where a certified sample, or a radius, is broken.

        A certificate that holds with some probability is withdrawn there instead.
        """
        if certificate is None:
            return None
        if certificate.alpha > 0:
            return self._upheld(certificate)
        refuted = self._refuted(certificate)
        if refuted.any():
            first = np.flatnonzero(refuted)[:5].tolist()
            raise ContradictionError(
                f"{int(refuted.sum())} samples are certified by {certificate.method} and broken by "
                f"an attack, as they are or within their radius (first: {first}); please report "
                "this"
            )
        return certificate

    def _refuted(self, certificate: Certificate) -> np.ndarray:
        """Tell of which samples an attack has done what is certified to be impossible, (n,)."""
        refuted = np.zeros(len(self.x), dtype=bool)
        broken = (self.right & ~self.standing).numpy()
        if certificate.certified is not None:
            refuted |= broken & certificate.certified
        if certificate.radius is not None:
            refuted |= broken & (self._distance().numpy() < certificate.radius * (1 - NEARER))
        if certificate.loss is not None:
            refuted |= self.worst.double().numpy() > certificate.loss
        return refuted

    def _distance(self) -> Tensor:
        """Return how far the point that counts is from each sample, in the norm of the threat."""
        return self.threat.norm(self.x_adv.double() - self.x.double())

    def _upheld(self, certificate: Certificate) -> Certificate:
        """Return a certificate without what it says of samples that are lost."""
        certified, radius, loss = certificate.certified, certificate.radius, certificate.loss
        standing = self.standing.numpy()
        if certified is not None:
            certified, radius = certified & standing, np.where(standing, radius, 0.0)  # type: ignore[arg-type]
        if loss is not None:
            loss = np.maximum(loss, self.worst.double().numpy())
        return replace(certificate, certified=certified, radius=radius, loss=loss)

    def estimate(self, right: Tensor, value: Tensor) -> Estimate:
        """Return the share that is right, or a regressor's mean error."""
        if self.model.task == "classification":
            return Estimate.proportion(int(right.sum()), len(right))
        return Estimate.mean(value.double().numpy())

    def totals(self, certificate: Certificate | None) -> tuple[Estimate, Estimate | None]:
        """Return the attacked figure, and the certified one."""
        found = self.estimate(self.standing, self.worst)
        if certificate is None:
            return found, None
        if certificate.certified is not None:
            return found, Estimate.proportion(int(certificate.certified.sum()), len(self.x))
        loss = certificate.loss
        return found, None if loss is None else Estimate.mean(loss)

    def predictions(self) -> np.ndarray:
        """Return what the model says at the points that count, (n,)."""
        output = self.harness.shared("", self.x_adv)
        return self.named(output.argmax(1).numpy()) if output.dim() == 2 else output.numpy()

    def named(self, labels: np.ndarray) -> np.ndarray:
        """Return column numbers as the labels of the user."""
        return labels if self.model.classes is None else np.asarray(self.model.classes)[labels]

    def samples(
        self, certificate: Certificate | None, predictions: np.ndarray
    ) -> tuple[Sample, ...]:
        """Return one row a sample."""
        classification = self.model.task == "classification"
        distance = self._distance()
        labels = self.named(self.y.numpy()) if classification else self.y.numpy()
        rows = []
        for i in range(len(self.x)):
            number = int(self.harness.numbers[i])
            sample: dict[str, Any] = {
                "index": number,
                "label": labels[i].item(),
                "digest": _digest(self.x[i]),
            }
            if classification:
                right, broken_by = bool(self.right[i]), self.broken_by[i]
                gone = float(distance[i]) if broken_by is not None else None
                sample |= {
                    "clean_correct": right,
                    "broken_by": broken_by,
                    "distance": gone if right else 0.0,
                    "clean_margin": float(self.value[i]),
                    "attacked_margin": float(self.worst[i]),
                    "prediction": predictions[i].item(),
                }
            else:
                sample |= {
                    "clean_loss": float(self.value[i]),
                    "attacked_loss": float(self.worst[i]),
                    "distance": float(distance[i]),
                }
            if certificate is not None and certificate.certified is not None:
                proven = bool(certificate.certified[i])
                standing = "open" if self.standing[i] else "falsified"
                sample |= {"certified": proven, "status": "certified" if proven else standing}
                sample["radius"] = float(certificate.radius[i])  # type: ignore[index]
            elif certificate is not None and certificate.loss is not None:
                sample["certified_loss"] = float(certificate.loss[i])
            rows.append(Sample(**sample))
        return tuple(rows)


def _digest(x: Tensor) -> str:
    """Return a hash of a sample that its precision does not change."""
    return hashlib.sha256(x.float().cpu().numpy().tobytes()).hexdigest()[:12]
