"""Errors a user can mend. Each message says what was found, what is expected, where, and what to do next, in one line."""


class BenchError(ValueError):
    """Base of every error that is the input's fault; the command line prints it as one line and exits with 2."""


class ConfigError(BenchError):
    """An experiment file, an override or a command-line option that cannot be used; may hold several faults, one a line."""


class DataError(BenchError):
    """Prompts, transcripts, candidates, scores or a model folder that cannot be used as they are."""


class StoreError(BenchError):
    """An artifact or a run folder that is missing, damaged, held by another process or not writable."""


class StageError(BenchError):
    """A stage that could not finish: a loss that is not finite, a sampler that failed."""
