"""What `robustlearn unit-test` does: plant adversarial examples, let an attack look for them."""

from typing import Any

from rich.console import Console
from rich.text import Text

from robustlearn.data import Dataset
from robustlearn.evaluate.binarisation import UnitTest, unit_test
from robustlearn.evaluate.diagnostics import Verdict, diagnose
from robustlearn.models import Model
from robustlearn.threats import LpBall

Result = tuple[UnitTest, Verdict | None]


def tested(
    model: Model,
    dataset: Dataset,
    threat: LpBall,
    *,
    attack: str,
    features: str,
    tests: int,
    verdict: bool,
    seed: int,
    device: Any,
    progress: Any,
) -> Result:
    """Return the unit test of the attack, and the verdict on the model if it is asked for."""
    with model.on(device):
        found = unit_test(
            model,
            dataset.x,
            dataset.y,
            threat,
            attack=attack,
            features=features,
            samples=tests,
            seed=seed,
            progress=progress,
        )
        said = diagnose(model, dataset.x, dataset.y, threat, seed=seed) if verdict else None
    return found, said


def plain(model: Model, dataset: Dataset, threat: LpBall, result: Result) -> dict[str, Any]:
    """Return the result as data for JSON."""
    found, said = result
    return {
        "model": model.name,
        "data": dataset.name,
        "threat": {**threat.describe(), "text": str(threat)},
        "unit_test": found.to_dict(),
        "verdict": None if said is None else said.to_dict(),
    }


def show(model: Model, dataset: Dataset, threat: LpBall, result: Result) -> None:
    """Print what was found."""
    console = Console()
    console.print(Text(f"{model.name} on {dataset.name}, {threat}"))
    for part in result:
        if part is not None:
            console.print(Text(str(part)))
