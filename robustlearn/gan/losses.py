"""What critic and generator minimise: pairs of pure functions of scores, one value a sample.

r = D(x) are the scores of real samples and q = D(G(z)) those of generated ones, (n,) each;
sp(t) = log(1 + eᵗ) and s(t) = 1/(1 + e⁻ᵗ), so that −log s(t) = sp(−t). A loss is a function of its
options that returns the `Pair`; filed in `LOSSES` it is in the game, the benchmark and the tests.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from robustlearn import registry
from robustlearn.errors import InputError
from robustlearn.gan.kernels import rbf
from robustlearn.registry import FINITE, NOT_NEGATIVE, POSITIVE, SHARE, UNIT, Registry

LOSSES = Registry("adversarial loss")
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """The losses of both players, ``(real, fake) -> (n,)``: each minimises the mean of its own.

    Attributes
    ----------
    critic_loss, generator_loss : the functions themselves; call them as `critic` and `generator`.
    critic_on, generator_on : what of the critic's output each one reads: ``"scores"`` (n,),
        ``"features"`` (n, d), or ``"errors"`` (n,) of a critic that is an autoencoder.
    uses_real : whether the generator's loss depends on the real samples.
    state, at, next_state : of a loss that adapts itself: the number it has arrived at, the pair
        of such a number, and (real, fake) -> the number of the next step.
    """

    critic_loss: Function
    generator_loss: Function
    critic_on: str = "scores"
    generator_on: str = "scores"
    uses_real: bool = False
    state: float = 0.0
    at: "Callable[[float], Pair] | None" = None
    next_state: Callable[[Tensor, Tensor], float] | None = None

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return what the critic minimises, (n,)."""
        return self.critic_loss(*_checked(real, fake, self.critic_on))

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return what the generator minimises, (n,)."""
        return self.generator_loss(*_checked(real, fake, self.generator_on))

    def following(self, real: Tensor, fake: Tensor) -> "Pair":
        """Return the pair of the next step: another one only if the loss adapts itself."""
        if self.at is None or self.next_state is None:
            return self
        return self.at(self.next_state(real.detach(), fake.detach()))


def get(chosen: str | Pair) -> Pair:
    """Return a pair as it is, or by name and options.

    Raises
    ------
    InputError for a loss or an option that there is not, and a value out of its range.

    Examples
    --------
    >>> import torch
    >>> real, fake = torch.zeros(2), torch.tensor([0.0, -10.0])
    >>> get("non_saturating").generator(real, fake)
    tensor([ 0.6931, 10.0000])
    >>> get("least_squares:a=0:b=1:c=1").critic(real, fake)
    tensor([ 0.5000, 50.5000])
    """
    if isinstance(chosen, Pair):
        return chosen
    function, options = registry.chosen(LOSSES, chosen)
    return function(**options)


def _checked(real: Tensor, fake: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Refuse shapes that would broadcast, as (n,) and (n, 1) do to (n, n)."""
    dims = 2 if kind == "features" else 1
    if real.dim() == dims and real.shape == fake.shape:
        return real, fake
    wanted = "(n, d)" if dims == 2 else "(n,)"
    raise InputError(
        f"{kind} of as many real as generated samples were expected, shape {wanted} each; got "
        f"{tuple(real.shape)} and {tuple(fake.shape)}"
    )


# ---------------------------------------------------------------- scores as log-odds


@LOSSES.register("minimax")
def minimax() -> Pair:
    """Critic sp(−r) + sp(q), generator −sp(q): the game of Goodfellow et al. (2014) itself.

    D* = p/(p + q), where the value −E sp(−r) − E sp(q) is 2·JS(p, q) − 2·log 2. Where the critic
    is sure, the generator's gradient −s(q) vanishes.
    """
    return Pair(_cross_entropy, lambda real, fake: -softplus(fake))


@LOSSES.register("non_saturating")
def non_saturating() -> Pair:
    """Critic sp(−r) + sp(q), generator sp(−q): as minimax, but the gradient s(q) − 1 stays.

    Source: Goodfellow et al. (2014), section 3.
    """
    return Pair(_cross_entropy, lambda real, fake: softplus(-fake))


@LOSSES.register("smoothed", ranges={"real": UNIT, "fake": UNIT})
def smoothed(real: float = 0.9, fake: float = 0.0) -> Pair:
    """Critic BCE(r, a) + BCE(q, b), generator sp(−q); BCE(t, a) = a·sp(−t) + (1 − a)·sp(t).

    D* = (a·p + b·q)/(p + q). One-sided for b = 0 (Salimans et al. 2016); two-sided for b > 0, where
    D* has a part in q that holds the generator's samples where they are.

    Raises
    ------
    InputError unless 0 ≤ b < a ≤ 1.
    """
    if not 0 <= fake < real <= 1:
        raise InputError(f"labels are smoothed to 0 ≤ fake < real ≤ 1; got {fake} and {real}")

    def towards(label: float, score: Tensor) -> Tensor:
        return label * softplus(-score) + (1 - label) * softplus(score)

    return Pair(lambda r, q: towards(real, r) + towards(fake, q), lambda r, q: softplus(-q))


@LOSSES.register("relativistic_paired")
def relativistic_paired() -> Pair:
    """Critic sp(−(r − q)), generator sp(−(q − r)): which of two is real.

    Invariant to a common shift of the scores; a constant critic gives log 2 to both. Source:
    Jolicoeur-Martineau (2019); with R1 and R2 the loss of R3GAN (Huang et al. 2024).
    """
    return Pair(
        lambda real, fake: softplus(fake - real),
        lambda real, fake: softplus(real - fake),
        uses_real=True,
    )


@LOSSES.register("relativistic_average")
def relativistic_average() -> Pair:
    """Critic sp(−(r − E q)) + sp(q − E r), generator sp(r − E q) + sp(−(q − E r)).

    Invariant to a common shift; a constant critic gives log 2 to each of the terms. The means E are
    over the batch of this process. Source: Jolicoeur-Martineau (2019).
    """

    def critic(real: Tensor, fake: Tensor) -> Tensor:
        return softplus(fake.mean() - real) + softplus(fake - real.mean())

    return Pair(critic, lambda real, fake: critic(fake, real), uses_real=True)


def _cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real) + softplus(fake)


# ---------------------------------------------------------------- scores as such


@LOSSES.register("hinge")
def hinge() -> Pair:
    """Critic (1 − r)₊ + (1 + q)₊, generator −q.

    The least over D is 2(1 − TV(p, q)), at D* = sign(p − q). Source: Lim and Ye (2017).
    """
    return Pair(lambda real, fake: (1 - real).relu() + (1 + fake).relu(), lambda real, fake: -fake)


@LOSSES.register("least_squares", ranges={"a": FINITE, "b": FINITE, "c": FINITE})
def least_squares(a: float = -1.0, b: float = 1.0, c: float = 0.0) -> Pair:
    """Critic ½(r − b)² + ½(q − a)², generator ½(q − c)².

    D* = (b·p + a·q)/(p + q). With (−1, 1, 0) twice the generator's loss over real and generated
    samples at D* is Pearson's χ²(p + q ‖ 2q). Source: Mao et al. (2017).
    """
    return Pair(
        lambda real, fake: ((real - b).square() + (fake - a).square()) / 2,
        lambda real, fake: (fake - c).square() / 2,
    )


@LOSSES.register("wasserstein")
def wasserstein() -> Pair:
    """Critic q − r, generator −q: −W₁(p, q) at the best critic with Lipschitz constant 1.

    The loss knows no bound: clip the weights (`regularizers.clipped`), or add a gradient penalty.
    Source: Arjovsky et al. (2017).
    """
    return Pair(lambda real, fake: fake - real, lambda real, fake: -fake)


# ---------------------------------------------------------------- variational bounds of divergences


def f_gan(activation: Callable[[Tensor], Tensor], conjugate: Callable[[Tensor], Tensor]) -> Pair:
    """Critic −T(r) + f*(T(q)), generator −f*(T(q)): the variational bound of D_f(p ‖ q).

    E_p T − E_q f*(T) ≤ D_f(p ‖ q) = E_q f(p/q), with equality at T* = f′(p/q), which is v = 0 where
    p = q. Source: Nowozin et al. (2016), whose output activations these are but for ``kl``.

    Parameters
    ----------
    activation : v -> T, onto the domain of f*.
    conjugate : v -> f*(T(v)), composed so that it does not lose digits.
    """
    return Pair(
        lambda real, fake: conjugate(fake) - activation(real),
        lambda real, fake: -conjugate(fake),
    )


@LOSSES.register("kl")
def kl() -> Pair:
    """The bound of KL(p ‖ q), f(u) = u·log u: T(v) = 1 + v, f*(T) = e^(T − 1) = eᵛ.

    v* = log(p/q). Nowozin et al. have T(v) = v: there a critic that starts at 0 is first raised at
    real and generated samples alike, until the two sides balance at 1.
    """
    return f_gan(lambda v: 1 + v, lambda v: v.exp())


@LOSSES.register("reverse_kl")
def reverse_kl() -> Pair:
    """The bound of KL(q ‖ p), f(u) = −log u: T(v) = −e⁻ᵛ, f*(T) = −1 − log(−T) = v − 1."""
    return f_gan(lambda v: -(-v).exp(), lambda v: v - 1)


@LOSSES.register("pearson")
def pearson() -> Pair:
    """The bound of χ²(p ‖ q), f(u) = (u − 1)²: T(v) = v, f*(T) = T²/4 + T; T* = 2(p/q − 1)."""
    return f_gan(lambda v: v, lambda v: v.square() / 4 + v)


@LOSSES.register("squared_hellinger")
def squared_hellinger() -> Pair:
    """The bound of ∫(√p − √q)², f(u) = (√u − 1)²: T(v) = 1 − e⁻ᵛ, f*(T) = T/(1 − T) = eᵛ − 1."""
    return f_gan(lambda v: 1 - (-v).exp(), lambda v: v.exp() - 1)


@LOSSES.register("js")
def js() -> Pair:
    """The bound of KL(p ‖ m) + KL(q ‖ m), m = (p + q)/2: T(v) = log 2 − sp(−v).

    f*(T) = −log(2 − e^T), which of T(v) is sp(v) − log 2: the minimax game, shifted by 2·log 2.
    """
    two = math.log(2)
    return f_gan(lambda v: two - softplus(-v), lambda v: softplus(v) - two)


# ---------------------------------------------------------------- errors and features


@LOSSES.register("began", ranges={"gamma": SHARE, "rate": NOT_NEGATIVE, "k": UNIT})
def began(gamma: float = 0.5, rate: float = 1e-3, k: float = 0.0) -> Pair:
    """Critic L(x) − k·L(G(z)), generator L(G(z)); k ← k + λ(γ·L(x) − L(G(z))), kept in [0, 1].

    L is the reconstruction error of a critic that is an autoencoder. k is at rest where
    γ·E L(x) = E L(G(z)). Source: Berthelot et al. (2017).

    Parameters
    ----------
    gamma : γ, the ratio of the errors at rest: more for more variety.
    rate : λ.
    k : where it starts; errors that are not finite leave it where it is.
    """

    def next_state(real: Tensor, fake: Tensor) -> float:
        step = rate * float(gamma * real.mean() - fake.mean())
        return min(max(k + step, 0.0), 1.0) if math.isfinite(step) else k

    return Pair(
        lambda real, fake: real - k * fake,
        lambda real, fake: fake,
        critic_on="errors",
        generator_on="errors",
        state=k,
        at=lambda k: began(gamma, rate, k),
        next_state=next_state,
    )


@LOSSES.register("mmd", ranges={"sigma": POSITIVE})
def mmd(sigma: float = 1.0) -> Pair:
    """Critic −MMD²(φ(x), φ(G(z))), generator MMD², without bias: MMD² = (1/n) Σᵢ hᵢ.

    hᵢ = (1/(n − 1)) Σ_{j≠i} k(xᵢ, xⱼ) + k(yᵢ, yⱼ) − k(xᵢ, yⱼ) − k(xⱼ, yᵢ), with the Gaussian kernel
    of width σ on the critic's features φ. Source: Gretton et al. (2012); Li et al. (2017).

    Raises
    ------
    InputError for a batch of a single sample.
    """

    def terms(real: Tensor, fake: Tensor) -> Tensor:
        if len(real) < 2:
            raise InputError("MMD compares pairs of samples: use batches of at least 2")
        across = rbf(real, fake, sigma)
        pairs = rbf(real, real, sigma) + rbf(fake, fake, sigma) - across - across.T
        return (pairs.sum(1) - pairs.diagonal()) / (len(real) - 1)

    return Pair(
        lambda real, fake: -terms(real, fake),
        terms,
        critic_on="features",
        generator_on="features",
        uses_real=True,
    )


@LOSSES.register("feature_matching")
def feature_matching(critic: str = "non_saturating") -> Pair:
    """Generator ‖E f(x) − E f(G(z))‖², critic that of another loss; f its features.

    0 on equal batches. The value belongs to the batch, and each sample is given it. Source:
    Salimans et al. (2016).

    Raises
    ------
    InputError for a critic's loss that adapts itself to both players' errors, as ``began`` does.
    """

    def generator(real: Tensor, fake: Tensor) -> Tensor:
        return (real.mean(0) - fake.mean(0)).square().sum().expand(len(fake))

    other = get(critic)
    if other.at is not None:
        raise InputError(
            f"{critic} adapts itself to a game of its own: choose another critic's loss"
        )
    return Pair(
        other.critic_loss, generator, other.critic_on, generator_on="features", uses_real=True
    )
