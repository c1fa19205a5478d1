"""Evidence for a change to a training step: timed, checked and written down as one record."""
