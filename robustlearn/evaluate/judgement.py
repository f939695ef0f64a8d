"""Whether the attacked figure of an evaluation can be believed, asked on the way and at the end."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn import _tensor
from robustlearn.certify import Certificate
from robustlearn.errors import ModelError
from robustlearn.evaluate import draws
from robustlearn.evaluate.diagnostics import Diagnosis, Verdict
from robustlearn.evaluate.harness import Harness
from robustlearn.evaluate.knowledge import Knowledge

PROBED = 64  # samples that a verdict looks at
CERTAIN = {"trustworthy": True, "findings": []}


class Judgement:
    """What speaks for and against the attacks of an evaluation so far.

    Attributes
    ----------
    suspicious : whether a diagnosis has failed on the way.
    notes : what was noticed and should be told.
    """

    def __init__(self, harness: Harness, known: Knowledge) -> None:
        self.harness, self.known, self.model = harness, known, harness.model
        self.suspicious = False
        self.notes: list[str] = []
        self._diagnosis: Diagnosis | None = None

    def unusable(self) -> str | None:
        """Return why gradients cannot be used, after looking at a few."""
        order = draws.shuffled(self.harness.seed, self.harness.numbers, use=1)
        some = order[self.known.right[order]][: min(PROBED, self.harness.batch_size)]
        if not self.model.differentiable or len(some) == 0:
            return None

        def steep(rows: Tensor) -> Tensor:
            x, y = (t[rows].to(self.model.device) for t in (self.harness.x, self.harness.y))
            return self.model.gradient(x, y, self.harness.loss)[0].reshape(len(rows), -1).cpu()

        try:
            gradient = torch.cat([found for _, found in self.harness.batches("", some, steep)])
        except ModelError as error:
            self.notes.append(str(error))
            return "no gradient flows through the model"
        flat = int((gradient.abs().amax(1) == 0).sum())
        if flat:
            self.notes.append(
                f"the gradient is exactly zero for {flat} of {len(some)} samples looked at: it may "
                "be masked (rounding, saturation, steps), and then attacks by gradient prove little"
            )
        return None

    def masked(self, broke: Mapping[str, Tensor]) -> bool:
        """Tell whether the gradients are suspicious, by what each attack broke so far."""
        if not self.suspicious:
            verdict = self._diagnosed(broke)
            self.suspicious = verdict is not None and bool(verdict.failed)
        return self.suspicious

    def verdict(
        self, broke: Mapping[str, Tensor], certificate: Certificate | None
    ) -> dict[str, Any]:
        """Return what there is to say on whether the attacked figure can be believed."""
        if self._closed(certificate):
            return {**CERTAIN, "text": "certain: the certificate meets the attack"}
        if not bool(self.known.standing.any()):
            return {**CERTAIN, "text": "certain: every sample is broken, or wrong from the start"}
        verdict = self._diagnosed(broke)
        if verdict is None:
            text = "no verdict: the checks need memory for a batch"
            return {"trustworthy": None, "text": text, "findings": []}
        return {**verdict.to_dict(), "text": str(verdict)}

    def _diagnosed(self, broke: Mapping[str, Tensor]) -> Verdict | None:
        """Return the verdict on as many samples as fit into the memory; None if none does."""
        verdict, size = None, min(PROBED, self.harness.batch_size)
        while verdict is None and size:
            try:
                self._diagnosis = self._diagnosis or self._begun(size)
                verdict = self._diagnosis.verdict(broke)
            except (RuntimeError, MemoryError) as error:
                if not _tensor.is_out_of_memory(error):
                    raise
                self._diagnosis, size = None, size // 2
        return verdict

    def _begun(self, size: int) -> Diagnosis:
        self.harness.progress("diagnosis", 0, 1)
        return Diagnosis(
            self.model,
            self.harness.x,
            self.known.named(self.harness.y.numpy()),
            self.harness.threat,
            outputs=self.known.clean,
            samples=size,
            seed=self.harness.seed,
            numbers=self.harness.numbers,
        )

    def _closed(self, certificate: Certificate | None) -> bool:
        """Tell whether no sample is left between certificate and attack."""
        if certificate is None:
            return False
        if certificate.certified is not None:
            proven = torch.from_numpy(certificate.certified)
            return not bool((self.known.standing & ~proven).any())
        worst = self.known.worst.double().numpy()
        return certificate.loss is not None and np.allclose(worst, certificate.loss, rtol=1e-6)
