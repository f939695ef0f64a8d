"""Tabular threats against a checker of plain loops and against every member of small sets."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import robustlearn as rl
from robustlearn.attacks import ATTACKS, unsuitable
from robustlearn.tabular import Tabular, from_table

NORMS = (1, 2, math.inf)
FEW = {
    "pgd": {"steps": 12},
    "apgd": {"steps": 20},
    "square": {"queries": 40},
    "nes": {"queries": 127},
    "retreat": {"queries": 60},
    "hop_skip_jump": {"queries": 120},
}
KEPT = 1e-9  # relative room for the rounding of the norm, which the checker adds up otherwise


def fault(threat, x, point, cost):
    """Say what is wrong with one row as a member; None if nothing is. Plain loops."""
    x, point = [float(v) for v in x], [float(v) for v in point]
    grouped = {j for group in threat.groups for j in group}
    sizes = []
    for j, (a, b) in enumerate(zip(x, point, strict=True)):
        if threat.lower is not None and b < float(torch.as_tensor(threat.lower).expand(len(x))[j]):
            return f"{j} below its wall"
        if threat.upper is not None and b > float(torch.as_tensor(threat.upper).expand(len(x))[j]):
            return f"{j} above its wall"
        if threat.mask is not None and not threat.mask[j] and a != b:
            return f"{j} is frozen"
        if threat.integer[j] and not b.is_integer():
            return f"{j} is no integer"
        if (b - a) * float(threat.direction[j]) < 0:
            return f"{j} went the wrong way"
        if j not in grouped and a != b:
            if threat.scale[j] == 0:
                return f"{j} has no unit"
            sizes.append(abs(b - a) / float(threat.scale[j]))
    for group in threat.groups:
        before, after = ([row[j] for j in group] for row in (x, point))
        if sorted(after) != [0.0] * (len(group) - 1) + [1.0]:
            return f"{group} has not one category"
        if before != after:
            sizes.append(cost)
    spent = max(sizes, default=0.0) if math.isinf(threat.p) else sum(s**threat.p for s in sizes)
    allowed = threat.eps if math.isinf(threat.p) else threat.eps**threat.p
    return f"costs {spent} of {allowed}" if spent > allowed * (1 + KEPT) else None


def small(p, eps, cost=1.5, **more):
    """Two integers, a category of three, a binary one: few enough members to list them all."""
    return Tabular(
        p,
        eps,
        integer=[True, True, False, False, False, False, False],
        groups=[(2, 3, 4), (5, 6)],
        cost=cost,
        lower=[-2.0, 0, 0, 0, 0, 0, 0],
        upper=[3.0, 4, 1, 1, 1, 1, 1],
        scale=[1.0, 0.5, 1, 1, 1, 1, 1],
        **more,
    )


def rows(n=6, seed=0):
    generator = np.random.default_rng(seed)
    x = np.zeros((n, 7))
    x[:, 0], x[:, 1] = generator.integers(-2, 4, n), generator.integers(0, 5, n)
    x[np.arange(n), 2 + generator.integers(0, 3, n)] = 1
    x[np.arange(n), 5 + generator.integers(0, 2, n)] = 1
    return torch.from_numpy(x)


def members(threat, x, cost=1.5):
    """List every member around one row."""
    found = []
    for a, b, c, d in itertools.product(range(-2, 4), range(5), range(3), range(2)):
        row = [a, b, *np.eye(3)[c], *np.eye(2)[d]]
        if fault(threat, x, row, cost) is None:
            found.append(row)
    return torch.tensor(np.array(found))


SETS = {
    "plain": {},
    "frozen": {"mask": [True, False, True, False, True, True, True]},
    "one way": {"direction": [1, -1, 0, 0, 0, 0, 0]},
}


@pytest.mark.parametrize("more", SETS.values(), ids=SETS)
@pytest.mark.parametrize("eps", [0.0, 1.0, 1.5, 2.3, 4.0])
@pytest.mark.parametrize("p", NORMS)
def test_the_operations_against_all_members(p, eps, more):
    threat, x = small(p, eps, **more), rows()
    g = torch.randn(len(x), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    point = x + 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    bound, worst = threat.support(g, x), threat.argmax(g, x)
    torch.testing.assert_close((g * worst).sum(1), bound, atol=1e-9, rtol=0)
    landed, drawn = threat.enclose(x, point), threat.sample(x, 5)
    low, high = threat.span(x)
    for i in range(len(x)):
        every = members(threat, x[i])
        held = threat.select(torch.tensor([i]))
        assert held.contains(x[i].expand(len(every), -1), every).all()
        value = ((every - x[i]) @ g[i]).max()
        assert value <= bound[i] + 1e-9  # sound
        if math.isinf(p):
            assert value >= bound[i] - 1e-9  # exact
            nearest = (every - point[i]).square().sum(1).min()
            assert (landed[i] - point[i]).square().sum() <= nearest + 1e-9
        for member in (landed[i], x[i] + drawn[i]):
            assert fault(threat, x[i], member, 1.5) is None
        assert torch.equal(low[i], every.amin(0))
        assert torch.equal(high[i], every.amax(0))


@pytest.mark.parametrize("p", NORMS)
def test_enclose_keeps_members_and_is_seldom_far_from_the_nearest(p):
    threat, x = small(p, 2.0), rows(30)
    point = x + 1.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    landed, excess = threat.enclose(x, point), []
    for i in range(len(x)):
        every = members(threat, x[i])
        assert torch.equal(threat.enclose(x[i].expand(len(every), -1), every), every)
        distance = (every - point[i]).square().sum(1).sqrt().min()
        excess.append(float((landed[i] - point[i]).square().sum().sqrt() / distance))
    assert np.median(excess) < 1 + 1e-9
    assert np.quantile(excess, 0.9) < 1.25


@pytest.mark.parametrize("p", NORMS)
def test_contains_knows_every_fault(p):
    threat = small(p, 2.0, direction=[1, 0, 0, 0, 0, 0, 0])
    x = torch.tensor([[0.0, 1, 1, 0, 0, 0, 1]])
    for change in ([0.5, 1, 1, 0, 0, 0, 1], [0, 1, 0.5, 0.5, 0, 0, 1], [0, 1, 0, 0, 0, 0, 1]):
        assert not threat.contains(x, torch.tensor([change], dtype=torch.float32)).any()
    for change in ([-1.0, 1, 1, 0, 0, 0, 1], [0, 9, 1, 0, 0, 0, 1], [3.0, 1, 1, 0, 0, 0, 1]):
        assert not threat.contains(x, torch.tensor([change])).any()
    assert threat.contains(x, x).all()
    assert threat.norm(torch.tensor([[0.0, 0, -1, 0, 1, 0, 0]])) == pytest.approx(1.5)


@pytest.mark.parametrize("p", NORMS)
def test_samples_reach_many_members(p):
    threat, x = small(p, 2.0), rows(1).expand(2000, -1)
    every = members(threat, x[0])
    drawn = {tuple(row.tolist()) for row in x + threat.sample(x, torch.Generator().manual_seed(0))}
    assert drawn <= {tuple(row.tolist()) for row in every}
    assert len(drawn) > len(every) / 3


def network(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, classes)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_ends_on_members(name, p, dtype):
    entry, threat, x = ATTACKS[name], small(p, 2.0), rows(12).to(dtype)
    affine = entry.facts["needs"] == "affine"
    model = rl.wrap((nn.Linear(7, 3).double() if affine else network()).to(dtype))
    if unsuitable(name, model, threat, (7,)) is not None:
        pytest.skip("another norm")
    y = model(x).argmax(1)
    x_adv = entry.function(model, x, y, threat, **FEW.get(name, {}))
    assert [fault(threat, a, b, 1.5) for a, b in zip(x, x_adv, strict=True)] == [None] * len(x)
    margin = rl.losses.margin
    assert margin(model(x_adv), y).mean() < margin(model(x), y).mean()


@pytest.mark.parametrize("p", NORMS)
def test_certificate_truth_attack_on_linear_models(p):
    """Between the two lies the truth over all members; square finds it."""
    torch.manual_seed(3)
    net, x, threat = nn.Linear(7, 3).double(), rows(12), small(p, 2.0)
    with torch.no_grad():
        y = net(x).argmax(1)
        certificate = rl.certify(net, x, threat, y=y)
        assert not certificate.exact
        found = ATTACKS["square"].function(net, x, y, threat, queries=200)
        reached = rl.losses.margin(net(found), y)
        missed = 0
        for i in range(len(x)):
            every = members(threat, x[i])
            margins = rl.losses.margin(net(every), y[i].expand(len(every)))
            assert certificate.margin[i] <= margins.min() + 1e-9
            if math.isinf(p):
                assert certificate.margin[i] == pytest.approx(margins.min().item(), abs=1e-9)
            distances = threat.norm(every - x[i])[margins < 0]
            assert certificate.radius[i] <= distances.amin() + 1e-9 if len(distances) else True
            assert reached[i] >= margins.min() - 1e-9
            missed += bool(reached[i] > 0 > margins.min())
    assert missed == 0


@pytest.fixture(scope="module", params=[(1, 2.0), (2, 1.5), (math.inf, 1.0)], ids=str)
def curved(request):
    """Six integers and a curved network, with the truth over all members."""
    p, eps = request.param
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
    steps = torch.tensor(list(itertools.product(range(-2, 3), repeat=6))).float()
    steps = steps[torch.linalg.vector_norm(steps, ord=p, dim=1) <= eps]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
        x = torch.randint(0, 6, (200, 6)).float()
        y = net(x).argmax(1)
        every = x[:, None] + steps
        legal = ((every >= 0) & (every <= 5)).all(2)
        robust = ((net(every).argmax(2) == y[:, None]) | ~legal).all(1)
    return net, x, y, Tabular(p, eps, integer=[True] * 6, lower=0.0, upper=5.0), robust


WEAKER = {"deepfool": 0.11, "fab": 0.11}  # their steps end at a boundary between members


@pytest.mark.parametrize("name", [*"pgd apgd mi_fgsm fmn ddn carlini_wagner".split(), *WEAKER])
def test_gradient_attacks_come_near_the_truth_over_all_members(name, curved):
    """What is judged between members and rounded away at the end is lost: it was up to 60%."""
    net, x, y, threat, robust = curved
    if unsuitable(name, rl.wrap(net), threat, (6,)) is not None:
        pytest.skip("another norm")
    found = ATTACKS[name].function(net, x, y, threat)
    stands = net(found).argmax(1) == y
    assert threat.contains(x, found).all()
    assert not (robust & ~stands).any()
    assert (stands & ~robust).float().mean() <= WEAKER.get(name, 0.03)


def test_a_one_way_feature_does_not_hold_up_an_ascent():
    """Short steps for p = 1 go to one feature: never to one that may not go there."""
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0], [-3.0, -1.0]]))
        net.bias.copy_(torch.tensor([0.0, -0.5]))
    threat = Tabular(1, 1.0, integer=[True, True], direction=[1, 0])
    x, y = torch.zeros(1, 2), torch.tensor([0])
    for name in ("pgd", "apgd", "mi_fgsm"):
        found = ATTACKS[name].function(net, x, y, threat)
        assert torch.equal(found, torch.tensor([[0.0, -1.0]])), name


def test_a_larger_budget_has_a_larger_radius_not_an_infinite_one():
    """The radius asks for any ε, so it must not stop at what the present ε can pay."""
    net = nn.Linear(7, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0] + [0.0] * 6, [-1.0] + [0.0] * 6]))
        net.bias.zero_()
    x = rows(1)
    x[0, 0] = 2.0
    certificate = rl.certify(net, x, small(math.inf, 1.0))
    assert certificate.certified.all()
    assert certificate.radius[0] == pytest.approx(2.0)


def test_one_budget_per_sample_and_evaluate():
    x = rows(12)
    threat = small(2, torch.linspace(0, 3, 12))
    model = rl.wrap(network())
    y = model(x).argmax(1)
    report = rl.evaluate(model, x, y, threat, attacks=["pgd", ("square", {"queries": 100})])
    assert report.attacked.value < 1
    assert 0 in [s.index for s in report.samples if s.broken_by is None]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: small(3, 1.0), "p = 1, 2 and inf"),
        (lambda: Tabular(1, 1.0), "one bool per feature"),
        (lambda: Tabular(1, 1.0, integer=[True, False], groups=[(0, 5)]), "column numbers"),
        (lambda: Tabular(1, 1.0, integer=[True, False], groups=[(0, 1), (1,)]), "column numbers"),
        (lambda: small(1, 1.0, cost=0.0), "must be positive"),
        (lambda: Tabular(1, 1.0, integer=[True], direction=[2]), "-1, 0 or 1"),
        (lambda: small(1, 1.0, direction=[0, 0, 1, 0, 0, 0, 0]), "one-hot column"),
        (lambda: small(1, 1.0).check(rows() + 0.5), "data outside the box|hold a fraction"),
        (lambda: small(1, 1.0).check(torch.zeros(2, 7)), "not exactly one 1"),
        (lambda: small(1, 1.0).check(torch.zeros(2, 6)), "rows of 7 features"),
    ],
)
def test_it_tells_what_is_wrong(make, said):
    with pytest.raises(rl.InputError, match=said):
        make()


# ---------------------------------------------------------------------- URLs and their table


@pytest.fixture(scope="module")
def urls(data_folder):
    """Phishing URLs: 63 features; all carry one label, so that another column is predicted."""
    import pandas

    folder = data_folder / "tabular"
    with np.load(folder / "url_candidates.npz") as file:
        x, y, scale = file["x"], file["y"], file["scale"]
    table = pandas.read_csv(folder / "url_features.csv")
    return x, y, scale, table


def test_the_table_of_the_urls_is_read_as_it_is_meant(urls):
    x, y, scale, table = urls
    threat = from_table(table, 2, 0.1)
    assert len(np.unique(y)) == 1  # no classifier of phishing can be learnt from these rows
    moves = table["max"].to_numpy() > table["min"].to_numpy()
    np.testing.assert_allclose(threat.scale.numpy()[moves], 1 / scale[moves])
    assert not threat.scale.numpy()[~moves].any()
    threat.check(torch.from_numpy(x))
    assert int(threat.integer.sum()) == 58
    shuffled = from_table(table, 2, 0.1, columns=list(table["feature"])[::-1])
    assert torch.equal(shuffled.scale, threat.scale.flip(0))


def independent(row, found, table, p, eps, frozen):
    """Say what is wrong with an adversarial URL, from the table alone."""
    sizes = []
    for a, b, name, kind, low, high in zip(
        row,
        found,
        table["feature"],
        table["type"],
        table["min"],
        table["max"],
        strict=True,
    ):
        if not low <= b <= high:
            return f"{name} = {b} leaves [{low}, {high}]"
        if kind == "int" and b != round(b):
            return f"{name} = {b} is no integer"
        if a != b and name in frozen:
            return f"{name} is frozen"
        if a != b:
            sizes.append(abs(b - a) / (high - low))
    spent = max(sizes, default=0) if math.isinf(p) else sum(s**p for s in sizes) ** (1 / p)
    return None if spent <= eps * (1 + KEPT) else f"costs {spent} of {eps}"


@pytest.mark.data
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("kind", ["logistic", "forest"])
def test_urls_are_attacked_within_every_constraint(urls, kind, p):
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, _, _, table = urls
    names = list(table["feature"])
    goal = names.index("page_rank")
    label = (x[:, goal] > 0).astype(int)  # 52% of them
    frozen = ["google_index", "domain_age"]  # what an adversary cannot change
    rows = np.delete(x, goal, axis=1)
    table = table.drop(index=goal).assign(mutable=lambda t: ~t["feature"].isin(frozen))
    model = (
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        if kind == "logistic"
        else RandomForestClassifier(10, random_state=0)
    ).fit(rows[::2], label[::2])
    some, y = rows[1::2][:60], label[1::2][:60]
    eps = {1: 0.6, 2: 0.3, math.inf: 0.1}[p]
    threat = from_table(table, p, eps)
    attacks = [("square", {"queries": 80})]
    attacks += ["fgsm", ("pgd", {"steps": 20})] if kind == "logistic" else []
    attacks += [("retreat", {"queries": 80})]
    wrapped = rl.wrap(model)
    points, labels = torch.from_numpy(some), torch.from_numpy(y)
    clean = (wrapped(points).argmax(1) == labels).double().mean()
    for name, given in ((a, {}) if isinstance(a, str) else a for a in attacks):
        found = ATTACKS[name].function(wrapped, points, labels, threat, **given)
        robust = (wrapped(found).argmax(1) == labels).double().mean()
        assert robust < clean - 0.03, name
        listed = zip(some, found.numpy(), strict=True)
        assert [independent(a, b, table, p, eps, frozen) for a, b in listed] == [None] * len(some)
    if kind == "logistic":  # certificate ≤ truth ≤ attack
        report = rl.evaluate(model, some, y, threat, attacks=["pgd", "linear_exact"])
        assert report.certified.value <= report.attacked.value


class Scaled(nn.Module):
    """A network on features scaled to [0, 1]."""

    def __init__(self, net, low, width):
        super().__init__()
        self.net, self.low, self.width = net, low, width

    def forward(self, x):
        return self.net((x - self.low) / self.width)


@pytest.mark.data
def test_no_ascent_on_urls_is_weaker_than_one_step(urls):
    """fmn left 98% where fgsm leaves 60%: what it found between members was rounded away."""
    x, _, _, table = urls
    low, width = (torch.tensor(v.to_numpy(float)) for v in (table["min"], table["max"]))
    width = torch.where(width > low, width - low, 1)
    points = torch.from_numpy(x[:150])
    unit = (points - low) / width
    torch.manual_seed(0)
    height = torch.tanh(2 * unit @ torch.randn(63, dtype=torch.float64))
    height += 0.3 * torch.sin(3 * unit @ torch.randn(63, dtype=torch.float64))
    y = (height > height.median()).long()
    net = nn.Sequential(nn.Linear(63, 64), nn.ReLU(), nn.Linear(64, 2)).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(unit), y).backward()
        optimizer.step()
    threat = from_table(table, 2, 0.1)

    model = rl.wrap(Scaled(net, low, width))

    def left(name, **options):
        found = ATTACKS[name].function(model, points, y, threat, **options)
        return (model(found).argmax(1) == y).double().mean()

    once = left("fgsm")
    assert 0.1 < once < 0.9
    for name, options in {"pgd": {"steps": 20}, "fmn": {"steps": 25}, "mi_fgsm": {}}.items():
        assert left(name, **options) <= once, name


def test_a_table_names_its_faults():
    import pandas

    table = pandas.DataFrame(
        [["a", "ohe0", True, 0, 1], ["b", "ohe0", True, 0, 1], ["c", "real", True, 0, 9]],
        columns=["feature", "type", "mutable", "min", "max"],
    )
    threat = from_table(table, 1, 1.0)
    assert threat.groups == ((0, 1),)
    x = torch.tensor([[1.0, 0.0, 3.0]])
    assert torch.equal(threat.enclose(x, x[:, [1, 0, 2]]), x[:, [1, 0, 2]])
    assert torch.equal(replace(threat, eps=0.9).enclose(x, x[:, [1, 0, 2]]), x)
    with pytest.raises(rl.InputError, match="lacks the columns min"):
        from_table(table.drop(columns="min"), 1, 1.0)
    with pytest.raises(rl.InputError, match="does not know d"):
        from_table(table, 1, 1.0, columns=["a", "d"])
    with pytest.raises(rl.InputError, match="got 'text'"):
        from_table(table.assign(type="text"), 1, 1.0)
