"""The command line: one verb per use. Nothing heavy is imported before a verb needs it."""

import functools
import json
import shlex
import sys
import traceback
from contextvars import ContextVar
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

import robustlearn
from robustlearn.errors import InputError

INTERRUPTED = 130  # as shells have it for Ctrl-C
GOES_ON = {
    "evaluate": "; an evaluation with --out goes on if you give the command with --resume",
    "train": "; it goes on from its last checkpoint if you give the command with --resume",
}
_given: ContextVar[list[str]] = ContextVar("given")

app = typer.Typer(
    name="robustlearn",
    help="How robust is a classifier? Certified ≤ true ≤ attacked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def run(arguments: list[str]) -> int:
    """Run a command; return 0 with an answer, 2 for what the user can mend, 1 for our fault."""
    _given.set(arguments)
    try:
        result = app(arguments, prog_name="robustlearn", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except (InputError, OSError) as error:
        _say(f"error: {error}")
        return 2
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # a usage error of typer's
            error.show()
            return 2
        traceback.print_exc()
        _say("error: this is a fault of robustlearn; please report it with the lines above")
        return 1
    if result == INTERRUPTED:
        _say("stopped" + GOES_ON.get(arguments[0], ""))
    return result if isinstance(result, int) else 0


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _number(text: str | float) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{text!r} is not a number or a fraction like 8/255") from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"robustlearn {robustlearn.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """How robust is a classifier? Certified ≤ true ≤ attacked."""


Model = Annotated[
    str,
    typer.Option(
        help="FILE.py:NAME or package.module:NAME, a model or a function without arguments that "
        "builds one; MODEL.skops; or a pickled model, with --allow-pickle."
    ),
]
Data = Annotated[
    str, typer.Option(help="FILE.npz (x, y), FILE.csv with --target, or a built-in set.")
]
Number = {"parser": _number, "metavar": "NUMBER"}
Norm = Annotated[str, typer.Option(help="linf, l2, l1, l0 or a number.")]
Eps = Annotated[float, typer.Option(help="Budget, as 0.1 or 8/255.", **Number)]
Lower = Annotated[float | None, typer.Option(help="Least value of a feature.", **Number)]
Upper = Annotated[float | None, typer.Option(help="Largest value of a feature.", **Number)]
Features = Annotated[
    Path | None,
    typer.Option(
        help="TABLE.csv with the type (int, real, ohe0, …), mutable, min and max of each feature; "
        "--eps is then a share of these ranges."
    ),
]
Target = Annotated[str | None, typer.Option(help="Target column of a .csv.")]
Task = Annotated[str | None, typer.Option(help="classification or regression, if it is not clear.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use a random part of the samples.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples sent together.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Pickle = Annotated[bool, typer.Option(help="Unpickle a model file. This runs code from the file.")]


@app.command()
def evaluate(
    model: Model,
    data: Data,
    eps: Eps,
    norm: Norm = "linf",
    lower: Lower = None,
    upper: Upper = None,
    features: Features = None,
    target: Target = None,
    task: Task = None,
    attacks: Annotated[
        str,
        typer.Option(
            help="quick, standard, thorough, autoattack, or NAME,… (NAME:option=value@scope)."
        ),
    ] = "standard",
    budget: Annotated[
        str | None,
        typer.Option(help="Most a sample may cost: gradients=60,forwards=500, or one of them."),
    ] = None,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Minimal-norm attacks on broken samples too.")
    ] = False,
    certify: Annotated[str, typer.Option(help="auto, none, or a method.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for the report.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with what an earlier run left in --out.")
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    limit: Limit = None,
    batch_size: BatchSize = 256,
    quiet: Quiet = False,
    as_json: AsJson = False,
    allow_pickle: Pickle = False,
) -> None:
    """Bound the robustness of a model from both sides and write a report."""
    from robustlearn.cli import inputs, screen
    from robustlearn.evaluate import document, evaluate, save
    from robustlearn.evaluate.sharing import first

    if resume and out is None:
        raise InputError("--resume goes with --out: the folder that holds the earlier run")
    samples, indices = inputs.samples(data, target, limit, seed)
    wrapped = inputs.model(model, task=task, allow_pickle=allow_pickle)
    columns = samples.feature_names
    threat = inputs.threat(norm, eps, lower, upper, features=features, columns=columns)
    state = None if out is None else inputs.state(out, resume)
    report = evaluate(
        wrapped,
        samples.x,
        samples.y,
        threat,
        attacks=attacks,
        certify=certify,
        budget=budget,
        nearest=nearest,
        seed=seed,
        batch_size=batch_size,
        device=device,
        progress=not (quiet or as_json),
        resume=state,
        data=samples.name,
        classes=samples.class_names,
        feature_names=samples.feature_names,
        indices=indices,
    )
    if out is not None:
        save([report], out, command=_command())
    if as_json and first():
        typer.echo(json.dumps(document([report], command=_command()), indent=1, allow_nan=False))
    elif not quiet and first():
        screen.show([report], out)


@app.command()
def certify(
    model: Model,
    data: Data,
    eps: Eps,
    norm: Norm = "linf",
    lower: Lower = None,
    upper: Upper = None,
    features: Features = None,
    target: Target = None,
    task: Task = None,
    method: Annotated[str, typer.Option(help="auto, or a method.")] = "auto",
    seconds: Annotated[
        float, typer.Option("--seconds", "--budget", help="That a sample may take.", **Number)
    ] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the rows.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    limit: Limit = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prove how far each sample is safe, without attacking."""
    from robustlearn.cli import inputs, screen

    samples, indices = inputs.samples(data, target, limit, seed)
    wrapped = inputs.model(model, task=task, allow_pickle=allow_pickle)
    columns = samples.feature_names
    threat = inputs.threat(norm, eps, lower, upper, features=features, columns=columns)
    with wrapped.on(device):
        result = inputs.certificate(wrapped, samples, indices, threat, method, seconds)
    if out is not None:
        inputs.write_certificate(out, result)
    if as_json:
        typer.echo(json.dumps(inputs.plain(result), indent=1, allow_nan=False))
    elif not quiet:
        screen.show_certificate(result, out)


@app.command()
def verify(
    network: Annotated[Path, typer.Argument(help="NETWORK.onnx")],
    rule: Annotated[Path, typer.Argument(metavar="PROPERTY", help="PROPERTY.vnnlib")],
    seconds: Annotated[float, typer.Option(help="After which the answer is unknown.")] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Decide a VNN-LIB property: unsat, sat with a counterexample, or unknown."""
    from robustlearn.cli import verification

    result = verification.verified(network, rule, seconds)
    typer.echo(json.dumps(result) if as_json else verification.told(result))


@app.command()
def train(
    model: Model,
    data: Data,
    eps: Eps,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, weights and the report.")],
    norm: Norm = "linf",
    lower: Lower = None,
    upper: Upper = None,
    features: Features = None,
    target: Target = None,
    objective: Annotated[
        str | None, typer.Option(help="Objective with its options, as trades:beta=6:steps=3.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step, of all processes.")] = 64,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.", **Number)] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.", **Number)] = 0.0,
    schedule: Annotated[str, typer.Option(help="constant, cosine, one_cycle or step.")] = (
        "one_cycle"
    ),
    ramp: Annotated[float, typer.Option(help="Share of the steps in which ε grows.")] = 0.5,
    memory: Annotated[
        bool | None,
        typer.Option(help="Start at the perturbation of the epoch before; if not said, if it can."),
    ] = None,
    memory_file: Annotated[
        Path | None, typer.Option(help="Where to keep these on disk, for one process.")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="cross_entropy, squared or huber; the first for whole labels."),
    ] = None,
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.0,
    class_weights: Annotated[
        str | None, typer.Option(help="Weights of the losses of classes, as 1,9; or balanced.")
    ] = None,
    extra: Annotated[str | None, typer.Option(help="More data, mixed into each batch.")] = None,
    extra_share: Annotated[
        float | None, typer.Option(help="Its share of a batch; if not said, 0.3.")
    ] = None,
    awp: Annotated[float, typer.Option(help="γ of adversarial weight perturbation.")] = 0.0,
    ema: Annotated[float | None, typer.Option(help="Decay of a running mean of weights.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bf16 or fp16.")] = "float32",
    crafting: Annotated[
        str | None, typer.Option(help="That in which points are sought; if not said, the same.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Channels innermost, for convolutions.")
    ] = False,
    pin_memory: Annotated[
        bool, typer.Option("--pin-memory", help="Fetch batches from page-locked memory.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="A part of each weight in each process (FSDP).")
    ] = False,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a gradient is the mean of.")] = 1,
    clip: Annotated[float | None, typer.Option(help="Largest norm of a gradient.")] = None,
    validation: Annotated[
        str, typer.Option(help="Share held out, or data, to choose the epoch by; 0 for none.")
    ] = "0.1",
    test: Annotated[
        str | None, typer.Option(help="Data for the report, which chooses nothing.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Epochs without progress before it stops.")
    ] = None,
    on_overfitting: Annotated[str, typer.Option(help="warn or rollback.")] = "warn",
    on_nonfinite: Annotated[str, typer.Option(help="skip, halve or stop.")] = "skip",
    attacks: Annotated[
        str, typer.Option(help="Evaluation at the end; none for none.")
    ] = "standard",
    tracker: Annotated[
        list[str] | None, typer.Option(help="tensorboard, mlflow or wandb; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    seed: Seed = 0,
    limit: Limit = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    allow_pickle: Pickle = False,
) -> None:
    """Train a network for the worst case, and bound what came of it.

    It runs where Accelerate finds an accelerator; with ACCELERATE_USE_CPU=1 on the CPU.
    """
    from robustlearn.cli import inputs, training
    from robustlearn.loop.randomness import seeded
    from robustlearn.train import fit

    samples, _ = inputs.samples(data, target, limit, seed, part="train")
    with seeded(seed):
        network = training.network(inputs.model(model, task=None, allow_pickle=allow_pickle))
    columns = samples.feature_names
    another = functools.partial(training.another, like=samples, target=target)
    threat = inputs.threat(norm, eps, lower, upper, features=features, columns=columns)
    result = fit(
        network,
        training.mixed(samples, another(extra, part="train"), extra_share),
        threat,
        objective=objective,
        validation=training.share(validation) or another(validation),
        test=another(test),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule,
        ramp=ramp,
        memory=training.memory(memory, memory_file),
        criterion=training.criterion(criterion, smoothing, class_weights, samples, network),
        awp=awp,
        crafting=crafting,
        on_overfitting=on_overfitting,
        seed=seed,
        out=out,
        attacks=None if attacks == "none" else attacks,
        progress=not (quiet or as_json),
        ema=ema,
        precision=precision,
        compile=compile,
        channels_last=channels_last,
        pin_memory=pin_memory,
        shard=shard,
        accumulate=accumulate,
        clip=clip,
        patience=patience,
        on_nonfinite=on_nonfinite,
        trackers=tracker or (),
        resume=resume,
    )
    if not result.history.first:
        return
    if as_json:
        typer.echo(json.dumps(inputs.plain(result.document()), indent=1, allow_nan=False))
    elif not quiet:
        training.show(result, out)


@app.command("fit-linear")
def fit_linear(
    data: Data,
    eps: Eps,
    norm: Norm = "l2",
    target: Target = None,
    loss: Annotated[
        str,
        typer.Option(
            help="squared, absolute or huber; logistic, hinge or squared_hinge for classes."
        ),
    ] = "squared",
    relative: Annotated[
        bool, typer.Option("--relative", help="--eps is a fraction of the largest that matters.")
    ] = False,
    standardize: Annotated[
        bool, typer.Option("--standardize", help="Scale features first; --eps is in these units.")
    ] = False,
    test_size: Annotated[float, typer.Option(help="Share held out.", **Number)] = 0.25,
    tol: Annotated[float, typer.Option(help="Relative duality gap to reach.")] = 1e-8,
    huber_threshold: Annotated[
        float,
        typer.Option(
            help="Where the Huber loss turns linear, in robust standard deviations of the target."
        ),
    ] = 1.35,
    huber_absolute: Annotated[
        bool, typer.Option("--huber-absolute", help="--huber-threshold is in units of the target.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File for the model, MODEL.skops.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a linear model for the worst case, with a proof, and compare it."""
    from robustlearn.cli import inputs, linear

    if not 0 < test_size < 1:
        raise InputError(f"--test-size lies between 0 and 1; got {test_size:g}")
    samples, _ = inputs.samples(data, target, None, seed)
    model, result = linear.fitted(
        samples,
        norm=inputs.threat(norm, eps, None, None).p,
        eps=eps,
        relative=relative,
        loss=loss,
        standardize=standardize,
        test_size=test_size,
        seed=seed,
        tol=tol,
        huber_threshold=huber_threshold,
        huber_relative=not huber_absolute,
    )
    if out is not None:
        linear.save(model, out)
    if as_json:
        typer.echo(json.dumps(result, indent=1, allow_nan=False))
    elif not quiet:
        linear.show(result, out)


@app.command("unit-test")
def plant(
    model: Model,
    data: Data,
    eps: Eps,
    norm: Norm = "linf",
    lower: Lower = None,
    upper: Upper = None,
    features: Features = None,
    target: Target = None,
    attack: Annotated[
        str, typer.Option(help="What is tested: NAME, or NAME:option=value.")
    ] = "pgd",
    head_reads: Annotated[
        str, typer.Option(help="What the planted head reads: auto, outputs or 'last linear'.")
    ] = "auto",
    tests: Annotated[int, typer.Option(min=1, help="Samples that are tested.")] = 32,
    verdict: Annotated[
        bool, typer.Option("--verdict", help="Also look for signs that attacks fail.")
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    limit: Limit = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    allow_pickle: Pickle = False,
) -> None:
    """Plant adversarial examples, and count how many of them an attack finds."""
    from robustlearn._progress import stages
    from robustlearn.cli import inputs
    from robustlearn.cli import unit_test as testing

    samples, _ = inputs.samples(data, target, limit, seed)
    wrapped = inputs.model(model, task=None, allow_pickle=allow_pickle)
    columns = samples.feature_names
    threat = inputs.threat(norm, eps, lower, upper, features=features, columns=columns)
    with stages(not (quiet or as_json)) as progress:
        result = testing.tested(
            wrapped,
            samples,
            threat,
            attack=attack,
            features=head_reads,
            tests=tests,
            verdict=verdict,
            seed=seed,
            device=device,
            progress=progress,
        )
    if as_json:
        whole = inputs.plain(testing.plain(wrapped, samples, threat, result))
        typer.echo(json.dumps(whole, indent=1, allow_nan=False))
    elif not quiet:
        testing.show(wrapped, samples, threat, result)


@app.command()
def detect(
    data: Annotated[str, typer.Option(help="Normal rows: FILE.csv, or FILE.npz with x.")],
    score: Annotated[str, typer.Option(help="Rows to judge, with the same columns.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report.")] = None,
    drop: Annotated[str | None, typer.Option(help="Column to leave out, such as a label.")] = None,
    method: Annotated[str, typer.Option(help="hard-negatives or mean-distance.")] = (
        "hard-negatives"
    ),
    false_alarm: Annotated[
        float, typer.Option(help="Share of normal rows that may be flagged.", **Number)
    ] = 0.05,
    explain: Annotated[
        int, typer.Option(min=0, help="Flagged rows to explain, the most anomalous first.")
    ] = 20,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Flag rows unlike the normal ones, with p-values and what would make each accepted."""
    from robustlearn.cli import detection
    from robustlearn.report import plain, write_detection

    found = detection.detected(
        data,
        score,
        drop=drop,
        method=method,
        false_alarm=false_alarm,
        explain=explain,
        seed=seed,
    )
    if out is not None:
        write_detection(found, out)
    if as_json:
        typer.echo(json.dumps(plain(found), indent=1, allow_nan=False))
    elif not quiet:
        detection.show(found, out)


@app.command()
def attacks(as_json: AsJson = False) -> None:
    """List the attacks, and the sets of them that evaluate knows."""
    from robustlearn.cli import screen

    listed = screen.attack_rows()
    if as_json:
        typer.echo(json.dumps(listed, indent=1))
    else:
        screen.show_attacks(listed)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="report.json, or the folder that holds it.")],
    second: Annotated[Path, typer.Argument(help="The same of the other model.")],
    out: Annotated[Path | None, typer.Option(help="HTML file for the comparison.")] = None,
    as_json: AsJson = False,
) -> None:
    """Test whether two models differ on the same samples, by McNemar's exact test."""
    from robustlearn import report
    from robustlearn.cli import screen

    documents = report.load(first), report.load(second)
    result = report.compared(*documents)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.comparison_page(*documents), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(report.plain(result), indent=1, allow_nan=False))
    else:
        screen.show_comparison(result, out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("robustness-report"),
    eps: Eps = 0.1,
    device: Device = "auto",
    seed: Seed = 0,
    limit: Limit = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train two classifiers of digits, attack and certify them, and write a report."""
    from robustlearn._progress import stages
    from robustlearn.cli import screen
    from robustlearn.cli.demo import demonstrate
    from robustlearn.evaluate import document, save

    with stages(not (quiet or as_json)) as progress:
        reports = demonstrate(eps=eps, seed=seed, limit=limit, device=device, progress=progress)
    save(reports, out, command=_command())
    if as_json:
        typer.echo(json.dumps(document(reports, command=_command()), indent=1, allow_nan=False))
    elif not quiet:
        screen.show(reports, out)


def _command() -> str:
    """Return the command line as it can be given again."""
    return shlex.join(["robustlearn", *_given.get()])
