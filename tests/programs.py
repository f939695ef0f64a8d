"""Exact minima of small ReLU networks over a threat, by mixed-integer linear programs."""

from collections.abc import Mapping

import numpy as np
import torch
from scipy import optimize, sparse
from torch import Tensor

from robustlearn._tensor import flat
from robustlearn.certify.relax import Region, Span_of
from robustlearn.models.graph import Network

CUTS, GAP = 200, 1e-6  # rounds of cutting planes, and what they may leave of the value


def least(
    network: Network,
    region: Region,
    rows: Tensor,
    offsets: Tensor,
    spans: Span_of,
    places: Mapping[int, Tensor],
    threshold: float | None = None,
) -> tuple[float, Tensor | None]:
    """min over the region of max over rows of rows·y + offsets, to the solver's 1e-6.

    a = ReLU(z) with l ≤ z ≤ u is a ≥ 0, a ≥ z, a ≤ u·b, a ≤ z − l(1 − b), b in {0, 1} (Tjeng,
    Xiao and Tedrake, 2019). A ball that is not a box is cut out by planes ⟨g, δ⟩ ≤ support(g), g
    the gradient of its norm at the point found, until that point is in it: every round's value is a
    lower bound.

    Parameters
    ----------
    region : of one sample; rows (m, K), offsets (m,).
    spans : bounds of what enters each activation; places : of the open signs in each.
    threshold : it is enough to know whether the value lies above.

    Returns
    -------
    The value, from below, and a point (*shape).
    """
    program = _Program(network, region, rows, offsets, spans, places)
    return program.solve(region, threshold)


class _Program:
    """Variables are the input, the outputs of all activations, the signs, and the value t."""

    def __init__(
        self, network: Network, region: Region, rows: Tensor, offsets: Tensor, spans: Span_of,
        places: Mapping[int, Tensor],
    ) -> None:  # fmt: skip
        sizes = {0: region.x[0].numel()}
        sizes |= {i: spans[i][0].numel() for i in network.activations}
        binaries = {i: len(places[i]) for i in network.activations}
        ends = np.cumsum([0, *sizes.values(), *binaries.values(), 1])
        names = [*sizes, *(("sign", i) for i in binaries), "value"]
        self.at = {name: slice(a, b) for name, a, b in zip(names, ends[:-1], ends[1:], strict=True)}
        self.n = int(ends[-1])
        self.low, self.high = np.full(self.n, -np.inf), np.full(self.n, np.inf)
        self.low[self.at[0]], self.high[self.at[0]] = (
            side.flatten().numpy() for side in region.box
        )
        self.matrices: list[sparse.csr_matrix] = []
        self.floors: list[np.ndarray] = []
        self.network, self.rows, self.offsets = network, rows, offsets
        for i in network.activations:
            self._activation(i, spans[i], places[i])
        value = self._row(network.output, rows.double())
        value[:, self.at["value"]] = -1
        offset = (rows.double() @ network.segments[network.output].offset.flatten()) + offsets
        self._at_least(-value, offset.numpy())  # t ≥ rows·y + offsets
        self.binary = np.zeros(self.n)
        for i in binaries:
            self.binary[self.at["sign", i]] = 1

    def _row(self, target: int, rows: Tensor) -> np.ndarray:
        """Return the coefficients of rows·z, z what enters the target, in all variables."""
        affine = self.network.segments[target]
        found = np.zeros((len(rows), self.n))
        parts = affine.pull(rows.reshape(len(rows), *affine.offset.shape))
        for source, part in zip(affine.sources, parts, strict=True):
            found[:, self.at[source]] += part.flatten(1).detach().numpy()
        return found

    def _at_least(self, matrix: np.ndarray, floor: np.ndarray) -> None:
        """Ask for matrix·v ≥ floor."""
        self.matrices.append(sparse.csr_matrix(matrix))
        self.floors.append(floor)

    def _activation(self, i: int, span: tuple[Tensor, Tensor], places: Tensor) -> None:
        low, high = (side.flatten().numpy() for side in span)
        offset = self.network.segments[i].offset.flatten().detach().numpy()
        enters = self._row(i, torch.eye(len(low), dtype=torch.float64))
        output = np.zeros_like(enters)
        output[:, self.at[i]] = np.eye(len(low))
        self.low[self.at[i]], self.high[self.at[i]] = low.clip(0), high.clip(0)
        on = low >= 0
        self._at_least(output - enters, offset)  # a ≥ z
        self._at_least((enters - output)[on], -offset[on])  # a ≤ z
        at = places.numpy()
        sign = np.zeros((len(at), self.n))
        sign[:, self.at["sign", i]] = np.eye(len(at))
        self._at_least(high[at, None] * sign - output[at], np.zeros(len(at)))  # a ≤ u·b
        lowered = enters[at] - output[at] + low[at, None] * sign
        self._at_least(lowered, low[at] - offset[at])  # a ≤ z − l(1 − b)
        self.low[self.at["sign", i]], self.high[self.at["sign", i]] = 0, 1

    def solve(self, region: Region, threshold: float | None) -> tuple[float, Tensor | None]:
        """Solve, and cut off what is not in the region, until that does not matter."""
        cost = np.zeros(self.n)
        cost[self.at["value"]] = 1
        for _ in range(CUTS):
            constraints = optimize.LinearConstraint(
                sparse.vstack(self.matrices), np.concatenate(self.floors), np.inf
            )
            found = optimize.milp(
                cost,
                constraints=constraints,
                integrality=self.binary,
                bounds=optimize.Bounds(self.low, self.high),
            )
            assert found.success
            bound = float(found.fun if found.mip_dual_bound is None else found.mip_dual_bound)
            point = torch.as_tensor(found.x[self.at[0]]).reshape(region.x.shape)
            if region.is_box:
                break
            point = self._cut(region, point)
            value = float(self._at(point).amax())
            decided = threshold is not None and (bound > threshold or value < threshold)
            if decided or value <= bound + GAP:
                break
        return bound, point[0]

    def _at(self, point: Tensor) -> Tensor:
        return self.network(point)[0] @ self.rows.T + self.offsets

    def _cut(self, region: Region, point: Tensor) -> Tensor:
        """Add the plane that cuts off a point outside; return the nearest towards x inside."""
        with torch.enable_grad():
            delta = (point - region.x).requires_grad_()
            norm = region.threat.norm(delta)
            (normal,) = torch.autograd.grad(norm.sum(), delta)
        reach = region.threat.support(normal, region.x) + (flat(normal) * flat(region.x)).sum(1)
        row = np.zeros((1, self.n))
        row[:, self.at[0]] = -flat(normal).numpy()
        self._at_least(row, -reach.numpy())
        share = (torch.as_tensor(region.threat.eps) / norm.detach()).clamp(max=1).nan_to_num(1)
        return region.x + delta.detach() * share
