"""A failed rewrite ends nobody's step: the block stays as it is, and the report says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fxopt.backends.reads import Reads
from fxopt.backends.unseen import CannotCapture
from fxopt.errors import FxoptError
from fxopt.passes.autocast import NotWrittenOut
from fxopt.passes.retrace import NotRetraced


def described(error: Exception) -> str:
    """ "ValueError: the first line of its message"."""
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def internal(error: Exception) -> str:
    """The same for a mistake of fxopt's own, of which it warns; the tests make that an error."""
    message = f"an internal error of fxopt: {described(error)}"
    warnings.warn(f"{message}; the block runs as it is", RuntimeWarning, stacklevel=2)
    return message


@contextmanager
def giving_up(
    reads: Reads | None = None, describe: Callable[[Exception], str] = internal
) -> Iterator[None]:
    """Turn what goes wrong in a capture, or behind one, into a CannotCapture.

    reads: what the capture reads of the module, whose attributes are put back.
    describe: what to say of other exceptions; by default they are a mistake of fxopt's, as in a
        pass or a rule, after which the module's own forward is still right.
    """
    reads = reads or Reads()
    try:
        yield
    except Exception as error:
        reads.undo()
        if isinstance(error, FxoptError):  # what the user is to hear
            raise
        is_known = isinstance(error, (CannotCapture, NotRetraced, NotWrittenOut))
        # An interpreter of a graph has added where it was.
        why = _first_line(error) if is_known else describe(error)
        raise CannotCapture(why, reads) from error
