"""Adversarial losses against quadrature and closed forms, never against themselves."""

import doctest
import math

import pytest
import torch
from scipy.stats import wasserstein_distance

from robustlearn import registry
from robustlearn.errors import InputError
from robustlearn.gan import LOSSES, kernels, losses, terms

X = torch.linspace(-14, 14, 701, dtype=torch.float64)
DX = float(X[1] - X[0])
MEAN, WIDTH = 0.8, 1.2  # of q; p is standard normal


def gauss(mean, width):
    return torch.exp(-((X - mean) ** 2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi))


P, Q = gauss(0.0, 1.0), gauss(MEAN, WIDTH)
V = torch.linspace(-30, 30, 6001, dtype=torch.float64)


def parts(pair):
    """The critic's loss as a part in r and a part in q, at zero of the other."""
    zero = torch.zeros_like(V)
    return pair.critic(V, zero) - pair.critic(zero[:1], zero[:1]), pair.critic(zero, V)


def best_critic(name):
    """For each x the score that minimises p·(part of r) + q·(part of q), and the least loss."""
    real, fake = parts(losses.get(name))
    at = torch.stack([(p * real + q * fake).min(0).indices for p, q in zip(P, Q, strict=True)])
    least = (P * real[at] + Q * fake[at]).sum() * DX
    return V[at], float(least)


def expected(f):
    """The integral of a function of p and q."""
    return float(f(P, Q).nan_to_num(0.0).sum() * DX)


LIKELY = (P > 1e-4) & (Q > 1e-4)
JS = expected(lambda p, q: p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log())


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("minimax", P / (P + Q)),
        ("non_saturating", P / (P + Q)),
        ("smoothed", 0.9 * P / (P + Q)),
        ("smoothed:real=0.8:fake=0.3", (0.8 * P + 0.3 * Q) / (P + Q)),
    ],
)
def test_the_best_critic_of_log_odds(name, share):
    scores, _ = best_critic(name)
    torch.testing.assert_close(scores.sigmoid()[LIKELY], share[LIKELY], atol=2e-3, rtol=0)


def test_the_value_of_minimax_is_the_jensen_shannon_divergence():
    _, least = best_critic("minimax")
    assert -least == pytest.approx(JS - 2 * math.log(2), abs=1e-5)  # JS here is twice the mean


def test_hinge_measures_total_variation():
    scores, least = best_critic("hinge")
    overlap = expected(torch.minimum)
    assert least == pytest.approx(2 * overlap, abs=1e-6)  # = 2(1 − TV)
    clear = (P - Q).abs() > 1e-3
    assert torch.equal(scores[clear].round(decimals=6).sign(), (P - Q)[clear].sign())


@pytest.mark.parametrize(("a", "b", "c"), [(-1.0, 1.0, 0.0), (0.0, 1.0, 1.0)])
def test_the_best_critic_of_least_squares(a, b, c):
    name = f"least_squares:a={a}:b={b}:c={c}"
    scores, _ = best_critic(name)
    wanted = (b * P + a * Q) / (P + Q)
    torch.testing.assert_close(scores[LIKELY], wanted[LIKELY], atol=6e-3, rtol=0)
    both = losses.get(name).generator(wanted, wanted)
    if (a, b, c) == (-1.0, 1.0, 0.0):
        chi = expected(lambda p, q: (p - q) ** 2 / (p + q))  # Pearson's χ²(p + q ‖ 2q)
        assert 2 * float(((P + Q) * both).nan_to_num(0.0).sum() * DX) == pytest.approx(chi)
    else:
        assert float(losses.get(name).generator(V, torch.ones_like(V)).abs().max()) == 0


def kl_of_normals(m1, s1, m2, s2):
    return math.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5


DIVERGENCES = {
    "kl": kl_of_normals(0, 1, MEAN, WIDTH),
    "reverse_kl": kl_of_normals(MEAN, WIDTH, 0, 1),
    # ∫p²/q − 1 of normals: w²/√(2w² − 1) · exp(m²/(2w² − 1)) − 1
    "pearson": WIDTH**2 / math.sqrt(2 * WIDTH**2 - 1) * math.exp(MEAN**2 / (2 * WIDTH**2 - 1)) - 1,
    "squared_hellinger": 2
    - 2 * math.sqrt(2 * WIDTH / (1 + WIDTH**2)) * math.exp(-(MEAN**2) / (4 * (1 + WIDTH**2))),
    "js": JS,
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_bound_of_a_divergence_is_tight(name):
    """Minus the least loss of the critic is the divergence of two normals in closed form."""
    _, least = best_critic(name)
    assert -least == pytest.approx(DIVERGENCES[name], rel=2e-3)


CONJUGATES = {  # f*(f′(u)) = u·f′(u) − f(u), from f alone
    "kl": lambda u: u,
    "reverse_kl": lambda u: math.log(u) - 1,
    "pearson": lambda u: u**2 - 1,
    "squared_hellinger": lambda u: math.sqrt(u) - 1,
    "js": lambda u: math.log((u + 1) / 2),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_generator_descends_what_the_critic_bounds(name):
    """Where p/q = u the generator's loss at the best score is −f*(f′(u))."""
    pair, (real, fake) = losses.get(name), parts(losses.get(name))
    for u in (0.3, 1.0, 2.5):
        best = V[(u * real + fake).argmin()][None]
        assert float(pair.generator(best, best)) == pytest.approx(-CONJUGATES[name](u), abs=0.03)


@pytest.mark.parametrize("name", [*DIVERGENCES, "minimax", "hinge", "least_squares", "wasserstein"])
def test_a_critic_at_0_is_in_balance(name):
    """Where p = q it is pulled up at real samples as it is pushed down at generated ones."""
    real, fake = torch.zeros(2, 1, requires_grad=True).unbind()
    slopes = torch.autograd.grad(losses.get(name).critic(real, fake).sum(), (real, fake))
    assert float(slopes[0] + slopes[1]) == 0
    assert float(slopes[1]) > 0


def slope(name, score):
    real, fake = torch.zeros(1), torch.tensor([score], requires_grad=True)
    (found,) = torch.autograd.grad(losses.get(name).generator(real, fake).sum(), fake)
    return float(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("minimax", -4.54e-5),
        ("non_saturating", -1.0),
        ("smoothed", -1.0),
        ("relativistic_paired", -1.0),
        ("hinge", -1.0),
        ("wasserstein", -1.0),
    ],
)
def test_the_generators_gradient_where_the_critic_is_sure(name, expected):
    assert slope(name, -10.0) == pytest.approx(expected, rel=1e-3)


SCORED = [n for n in LOSSES if losses.get(n).generator_on == losses.get(n).critic_on == "scores"]


@pytest.mark.parametrize("name", SCORED)
def test_the_generator_wants_higher_scores_and_the_critic_lower_ones(name):
    """Near 0 each player's own derivative by the score of a generated sample has its sign."""
    pair, real = losses.get(name), torch.zeros(3)
    fake = torch.tensor([-0.5, -0.2, -0.1], requires_grad=True)
    (up,) = torch.autograd.grad(pair.generator(real, fake).sum(), fake)
    (down,) = torch.autograd.grad(pair.critic(real, fake).sum(), fake)
    assert bool((up < 0).all())
    assert bool((down > 0).all())


@pytest.mark.parametrize("name", ["relativistic_paired", "relativistic_average", "wasserstein"])
def test_a_common_shift_of_the_scores_changes_no_game(name):
    pair = losses.get(name)
    real, fake = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).double()
    moves = [pair.critic, pair.generator] if name != "wasserstein" else [pair.critic]
    for function in moves:
        torch.testing.assert_close(function(real + 5, fake + 5), function(real, fake))


def test_what_a_constant_critic_costs():
    """A toss of a coin: log 2 for each question that is answered."""
    for name, critic, generator in (
        ("relativistic_paired", 1, 1),
        ("relativistic_average", 2, 2),
        ("non_saturating", 2, 1),
        ("minimax", 2, -1),
    ):
        pair, zero = losses.get(name), torch.zeros(4)
        assert pair.critic(zero, zero).tolist() == pytest.approx([critic * math.log(2)] * 4)
        assert pair.generator(zero, zero).tolist() == pytest.approx([generator * math.log(2)] * 4)


def test_the_best_1_lipschitz_critic_on_the_line_finds_the_wasserstein_distance():
    """Its slope is the sign of F_q − F_p; no other one that is 1-Lipschitz finds more."""
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 60, generator=source, dtype=torch.float64)
    y = 2 * y + 0.3
    both, place = torch.cat([x, y]).sort()
    ahead = (torch.where(place < 60, -1.0, 1.0) / 60).cumsum(0)  # F_q − F_p
    pair = losses.get("wasserstein")

    def loss(slopes):
        heights = torch.cat([torch.zeros(1), (slopes * both.diff()).cumsum(0)])
        scores = torch.empty_like(heights).scatter(0, place, heights)
        return float(pair.critic(scores[:60], scores[60:]).mean())

    distance = wasserstein_distance(x, y)
    assert -loss(ahead[:-1].sign()) == pytest.approx(distance)
    for _ in range(20):
        assert -loss(2 * torch.rand(119, generator=source) - 1) < distance


def test_the_best_relativistic_critic_of_two_points():
    """Real ones are 0 or 1 by p, generated ones by q: D(0) − D(1) = log(p₀q₁/(p₁q₀))."""
    p, q = (0.7, 0.3), (0.4, 0.6)
    zero = torch.zeros_like(V)
    scores = (V, zero)  # of the points 0 and 1
    loss = sum(
        p[i] * q[j] * losses.get("relativistic_paired").critic(scores[i], scores[j])
        for i in range(2)
        for j in range(2)
    )
    assert float(V[loss.argmin()]) == pytest.approx(math.log(0.7 * 0.6 / (0.3 * 0.4)), abs=0.01)


def test_the_balance_of_began_rests_where_its_ratio_is_met():
    pair = losses.get("began:gamma=0.5:rate=0.1")
    real, fake = torch.full((4,), 2.0), torch.full((4,), 1.0)
    assert pair.following(real, fake).state == pair.state == 0.0
    rising = pair.following(2 * real, fake)
    assert rising.state == pytest.approx(0.1)
    assert rising.critic(real, fake).tolist() == pytest.approx([1.9] * 4)
    assert rising.following(real, 100 * fake).state == 0.0
    assert rising.following(100 * real, fake).state == 1.0
    assert rising.following(real, fake * math.nan).state == rising.state


def test_mmd_is_that_of_two_normals():
    source = torch.Generator().manual_seed(0)
    found = []
    for _ in range(40):
        real, fake = torch.randn(2, 300, 1, generator=source, dtype=torch.float64)
        found.append(losses.get("mmd").generator(real, fake + 1).mean())
    truth = 2 / math.sqrt(3) * (1 - math.exp(-1 / 6))
    assert truth == pytest.approx(0.17727, abs=1e-5)
    values = torch.stack(found)
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - truth) < 3 * error
    assert error < 0.005


def test_the_relativistic_average_of_two_samples_a_side():
    """Each real score against the mean of the generated ones, and the other way round."""
    real, fake = torch.tensor([[1.0, 3.0], [0.0, 1.0]], dtype=torch.float64)
    pair = losses.get("relativistic_average")

    def asked(upper, lower):  # −log s(r − E q) − log(1 − s(q − E r))
        means = lower.mean(), upper.mean()
        return -(upper - means[0]).sigmoid().log() - (1 - (lower - means[1]).sigmoid()).log()

    torch.testing.assert_close(pair.critic(real, fake), asked(real, fake))
    torch.testing.assert_close(pair.generator(real, fake), asked(fake, real))


def test_the_critic_of_mmd_wants_what_the_generator_does_not():
    real, fake = torch.randn(2, 20, 2, generator=torch.Generator().manual_seed(0))
    pair = losses.get("mmd")
    torch.testing.assert_close(pair.critic(real, fake + 1), -pair.generator(real, fake + 1))


def test_mmd_leaves_out_what_is_compared_with_itself():
    """The mean over pairs i ≠ j, written out for three samples a side."""
    real, fake = [0.0, 0.5, 2.0], [1.0, -1.0, 0.3]

    def k(a, b):
        return math.exp(-((a - b) ** 2) / (2 * 0.7**2))

    wanted = [
        k(real[i], real[j]) + k(fake[i], fake[j]) - k(real[i], fake[j]) - k(real[j], fake[i])
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    columns = [torch.tensor(part, dtype=torch.float64)[:, None] for part in (real, fake)]
    found = losses.get("mmd:sigma=0.7").generator(*columns)
    assert float(found.mean()) == pytest.approx(sum(wanted) / 6)


def test_feature_matching_is_the_method_of_moments():
    """With f(x) = (x, x²) its slope pulls the moments together; 0 on equal batches."""
    pair = losses.get("feature_matching")
    x = torch.tensor([[-1.0], [0.0], [2.0]])
    features = torch.cat([x, x**2], 1)
    assert pair.generator(features, features.flip(0)).tolist() == [0, 0, 0]
    moved = features + torch.tensor([0.5, 1.0])
    assert pair.generator(features, moved).tolist() == pytest.approx([1.25] * 3)


def test_terms_of_a_task():
    scores = torch.tensor([0.0, 2.0], dtype=torch.float64)
    found = terms.adversarial_cross_entropy(scores, weight=3.0)
    assert found.tolist() == pytest.approx((-3 * scores.sigmoid().log()).tolist())
    assert terms.adversarial_hinge(scores, margin=1.5).tolist() == [1.5, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_one_number_a_sample_and_explain_themselves(name):
    pair = losses.get(name)
    for function, kind in ((pair.critic, pair.critic_on), (pair.generator, pair.generator_on)):
        shape = (4, 3) if kind == "features" else (4,)
        assert function(torch.rand(shape), torch.rand(shape)).shape == (4,)
        with pytest.raises(InputError, match="shape"):
            function(torch.rand(4), torch.rand(4, 1))
    assert "generator" in LOSSES[name].summary.lower() or "bound" in LOSSES[name].summary


def test_what_cannot_be_is_refused():
    for wrong, said in (
        ("nonsense", "no adversarial loss named"),
        ("hinge:a=1", "no option a"),
        ("smoothed:real=0.2:fake=0.5", "0 ≤ fake < real ≤ 1"),
        ("began:rate=-1", "rate must be a number"),
        ("began:gamma=7", "gamma must be a number"),
        ("mmd:sigma=x", "sigma must be a number"),
        ("feature_matching:critic=began", "choose another critic's loss"),
        (3, "expected a name"),
    ):
        with pytest.raises(InputError, match=said):
            losses.get(wrong)
    with pytest.raises(InputError, match="at least 2"):
        losses.get("mmd").critic(torch.zeros(1, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("module", [losses, kernels, terms, registry])
def test_the_examples_of_the_docstrings(module):
    assert doctest.testmod(module, raise_on_error=True).attempted
