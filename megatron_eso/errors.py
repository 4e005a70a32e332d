"""The errors a user can cause, one class per place to look.

Every message says what was requested, the numbers, and the setting or command to change. The command
line prints the message without a traceback and exits with ``exit_code``; any other error is a bug and
shows its traceback.
"""


class UserError(Exception):
    """An error that the user can correct; printed as a message, not as a traceback."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration is not valid; the message lists all violations together."""


class DataError(UserError):
    """The data set is missing, damaged, or not the one that the run needs."""

    exit_code = 3


class VocabularyError(DataError):
    """The vocabulary of the data is not that of the model."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit the run."""

    exit_code = 4


class LostLeaseError(CheckpointError):
    """Another attempt has taken the run's folder over, so this one may not publish."""


class TrainingError(UserError):
    """Training cannot continue, for example because the loss is not finite."""

    exit_code = 5


class ClusterError(UserError):
    """Slurm or the cluster profile refused what was asked."""

    exit_code = 6


# Exit codes that do not mean a user error; docs/resilience.md lists them all.
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal, with a checkpoint; run it again
CRASH_LOOP_EXIT_CODE = 7  # the launcher gave up after faults in a row without a newer checkpoint
HANG_EXIT_CODE = 8  # the launcher ended ranks without progress and may not start them again
