"""What evaluate says of an anomaly detector: its two ways to fail, told apart."""

from collections.abc import Sequence

from robustlearn.evaluate.results import Estimate, Sample

KINDS = (
    (-1, "evasion", "anomalies that are flagged", "moved to where they are accepted"),
    (1, "false alarm", "normal rows that are accepted", "moved to where they are flagged"),
)


def told_apart(samples: Sequence[Sample], *, certified: bool) -> list[str]:
    """Return a note on the samples of each label: −1, what is to be flagged, and 1, the normal.

    Parameters
    ----------
    samples : of a detector's evaluation.
    certified : whether there was a certificate.
    """
    notes = []
    for label, failure, which, what in KINDS:
        right = [s for s in samples if s.label == label and s.clean_correct]
        wrong = sum(s.label == label for s in samples) - len(right)
        if not right:
            continue
        broken = Estimate.proportion(sum(s.broken_by is not None for s in right), len(right))
        proven = sum(bool(s.certified) for s in right)
        note = f"{failure}: of the {which}, a share of {broken} is {what}"
        note += f", and {proven} are proven to stay" if certified else ""
        notes.append(note + (f"; {wrong} more are wrong without a change" if wrong else ""))
    return notes
