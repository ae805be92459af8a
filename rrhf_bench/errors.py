"""Errors a user can mend. Each message says, in one line, where, what was found, what is expected, what to do next."""


class BenchError(ValueError):
    """Base of every error that is the input's fault; the command line prints it as one line and exits with 2."""


class ConfigError(BenchError):
    """An experiment file, an override or an option that cannot be used; may hold several faults, one a line."""


class DataError(BenchError):
    """Prompts, transcripts, candidates, scores or a model folder that cannot be used as they are."""


class StoreError(BenchError):
    """An artifact or a run folder that is missing, damaged, held by another process or not writable."""


class StageError(BenchError):
    """A stage that could not finish: a loss that is not finite, a sampler that failed."""
