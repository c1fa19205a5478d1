"""A failed rewrite ends nobody's step: the block stays as it is, and the report says why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from fxopt.backends.reads import Reads
from fxopt.backends.unseen import CannotCapture
from fxopt.errors import FxoptError
from fxopt.passes.autocast import NotWrittenOut


def described(error: Exception) -> str:
    """ "ValueError: the first line of its message"."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def internal(error: Exception) -> str:
    """The same for a mistake of fxopt's own, of which it warns; the tests make that an error."""
    message = f"an internal error of fxopt: {described(error)}"
    warnings.warn(f"{message}; the block runs as it is", RuntimeWarning, stacklevel=2)
    return message


@contextmanager
def giving_up(reads: Reads) -> Iterator[None]:
    """Turn what goes wrong behind an export, which read `reads`, into a CannotCapture."""
    try:
        yield
    except (CannotCapture, NotWrittenOut) as reason:
        raise CannotCapture(str(reason), reads) from reason
    except FxoptError:  # what the user is to hear
        raise
    except Exception as error:  # a mistake in a pass or a rule: the module's own forward is right
        raise CannotCapture(internal(error), reads) from error
