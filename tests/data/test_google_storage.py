"""gs:// with Google's own client and a service account, by the released client and a local server."""

import subprocess
import sys

import numpy as np
import pytest

from megatron_eso.data import cache
from megatron_eso.data.transports import StreamingTransport, transport_for
from megatron_eso.errors import DataError
from tests.data.conftest import all_rows

pytest.importorskip("google.cloud.storage", reason="Google's client is not installed: NOT TESTED")


@pytest.fixture(scope="module")
def google(prepared, tmp_path_factory):
    from tests.data.google_store import GoogleStore

    running = GoogleStore(prepared.parent)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GCS_KEY", "GCS_SECRET"):
            patch.delenv(name, raising=False)
        credentials = tmp_path_factory.mktemp("google") / "account.json"
        for name, value in running.environment(credentials).items():
            patch.setenv(name, value)
        yield running
    running.close()


@pytest.fixture(autouse=True)
def clean(google, monkeypatch):
    monkeypatch.setattr(cache, "FIRST_PAUSE_SECONDS", 0.01)
    google.faults = {}
    google.requests.clear()


def read(address, tmp_path):
    return all_rows(address, tmp_path / "cache")


# After a 503 Google's client leaves the socket to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", ["", "503", "flip", "cut"])
def test_the_rows_are_those_of_the_folder(google, prepared, tmp_path, fault):
    google.faults = {"train/shard.00000.mds": [fault]} if fault else {}
    rows = read("gs://shards/set/train", tmp_path)
    assert np.array_equal(rows, read(prepared / "train", tmp_path))
    num_requests = sum(name.endswith("shard.00000.mds") for name in google.requests)
    assert num_requests >= 2 if fault else num_requests == 1


@pytest.mark.parametrize("status", ["404", "403"])
def test_what_no_retry_helps_is_said_at_once(google, prepared, tmp_path, status):
    google.faults = {"train/shard.00000.mds": [status] * 9}
    with pytest.raises(DataError, match=r"shard\.00000\.mds .* after 1 of 5 attempts"):
        read("gs://shards/set/train", tmp_path)


def test_a_missing_set_and_missing_credentials_are_named(google, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"gs://shards/other/train/manifest\.json .* 1 of 5 .*404"):
        read("gs://shards/other/train", tmp_path)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(DataError, match=r"1 of 5 attempts .* Application Default Credentials"):
        read("gs://shards/set/train", tmp_path)


def test_a_client_that_is_not_installed_is_named(google, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(DataError, match=r"after 1 of 5 .*pip install -e '\.\[gs\]'"):
        read("gs://shards/set/train", tmp_path)


@pytest.mark.slow
def test_a_process_that_has_loaded_nothing_else_can_fetch(google, prepared, tmp_path):
    """streaming's modules import each other; which order works is not seen once others ran here."""
    program = (
        "import sys; from pathlib import Path; from megatron_eso.data.transports import transport_for\n"
        "store = transport_for(sys.argv[1], timeout_seconds=5.0)\n"
        "store.fetch('manifest.json', Path(sys.argv[2]))\n"
    )
    assert isinstance(transport_for("gs://shards/set", timeout_seconds=1.0), StreamingTransport)
    target = tmp_path / "manifest.json"
    command = [sys.executable, "-c", program, "gs://shards/set/train", str(target)]
    subprocess.run(command, check=True, timeout=300)
    assert target.read_bytes() == (prepared / "train" / "manifest.json").read_bytes()
