"""Fixtures: pools of ranks for the session, and a single rank in the test process itself."""

import pytest

from tests import released
from tests.rank_pool import RankPool


@pytest.fixture(scope="session")
def two_ranks():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks():
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank():
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def te_ranks(tmp_path_factory):
    """Return two ranks with the Transformer Engine with which the installed Megatron-Core was tested."""
    pool = released.te_pool(tmp_path_factory.mktemp, "2.11.0")
    yield pool
    pool.close()
