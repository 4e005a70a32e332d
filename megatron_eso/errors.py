"""The errors a user can cause, one class per place to look.

Every message says what was asked, the numbers, and the setting or command to change. The command
line prints them without a traceback and exits with ``exit_code``; anything else is a bug and shows
its traceback.
"""


class UserError(Exception):
    """Something the user can put right; printed as a message, not as a traceback."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration is not valid; the message lists every violation at once."""


class DataError(UserError):
    """The data set is missing, damaged, or not the one the run asks for."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit the run."""

    exit_code = 4


class LostLeaseError(CheckpointError):
    """Another attempt has taken the run's folder over, so this one may not publish."""


class TrainingError(UserError):
    """Training cannot go on: a loss that is not finite, say."""

    exit_code = 5


class ClusterError(UserError):
    """Slurm or the cluster profile refused what was asked."""

    exit_code = 6


# Exit codes that are no error of the user's; docs/resilience.md lists them all.
STOPPED_EXIT_CODE = (
    75  # EX_TEMPFAIL: stopped by a signal with a checkpoint, run the same command again
)
CRASH_LOOP_EXIT_CODE = 7  # the launcher gave up: faults in a row without a newer checkpoint
HANG_EXIT_CODE = 8  # the launcher ended ranks that made no progress, and may not start them again
