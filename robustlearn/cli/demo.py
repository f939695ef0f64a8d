"""The main job on data that ships with scikit-learn: two classifiers of digits."""

import math
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from robustlearn import data
from robustlearn.evaluate import Report, evaluate
from robustlearn.threats import LpBall

TRAIN = 1200  # of 1,797 images; the rest is attacked
EPOCHS = 20


class DigitsNet(nn.Sequential):
    """Two convolutions and a hidden layer, for images (1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def demonstrate(
    *, eps: float, seed: int, limit: int | None, device: Any, progress: Any
) -> list[Report]:
    """Train a small network and a linear pipeline, and evaluate both on held-out images."""
    digits = data.load("digits")
    order = np.random.default_rng(seed).permutation(len(digits))
    train, indices = digits.take(order[:TRAIN]), np.sort(order[TRAIN:][:limit])
    test = digits.take(indices)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=1000))
    pipeline.fit(train.x.reshape(TRAIN, -1), train.y)
    models = [trained(train, seed, progress), pipeline]
    threat = LpBall(math.inf, eps, lower=0.0, upper=1.0)
    return [
        evaluate(
            model,
            test.x,
            test.y,
            threat,
            seed=seed,
            device=device,
            progress=lambda stage, done, total: progress(f"{stage}", done, total),
            data="digits",
            classes=digits.class_names,
            indices=indices,
        )
        for model in models
    ]


def trained(train: data.Dataset, seed: int, progress: Any) -> nn.Module:
    """Return a `DigitsNet` trained in the ordinary way, without any defence."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DigitsNet()
        x, y = torch.as_tensor(train.x).float(), torch.as_tensor(train.y)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3, weight_decay=1e-4)
        for epoch in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
            progress("training the network", epoch + 1, EPOCHS)
    return net
