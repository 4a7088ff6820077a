"""Errors a user can mend. The message says what is wrong and what to do."""


class FairwayError(Exception):
    """Base of every expected error; the command line prints it without a traceback."""


class ConfigError(FairwayError):
    """A setting, or a combination of settings, that cannot run."""


class DataError(FairwayError):
    """A missing, damaged or unfit shard, tokenizer or text file."""


class ArtifactError(FairwayError):
    """An artifact that is damaged, of another version, or does not fit its limit."""


class RunError(FairwayError):
    """A run that cannot go on: diverged, unwritable folder, unfit checkpoint, lost rank."""
