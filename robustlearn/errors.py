"""What went wrong, told to the person who can mend it."""


class InputError(ValueError):
    """The input cannot be used as it is: data, labels, threat, options or file.

    The message says what was expected, what came, and what to do. The command line
    answers it with exit status 2; every other exception is a fault of robustlearn (1).
    """


class ModelError(InputError):
    """The user's model raised, or returned something that is not a usable output."""


class AttackError(RuntimeError):
    """An attack broke its contract: a point outside the threat, or of another shape or dtype."""


class ContradictionError(RuntimeError):
    """A sample is both certified and broken: one of the two bounds is wrong."""
