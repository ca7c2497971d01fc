"""A few of the schedules of faults that `benchmarks/storage_faults.py` runs by the hundred."""

import os
from collections import Counter

import pytest

from benchmarks.storage_faults import PUBLICATIONS, survive
from tests.fault_proxy import FAULTS


def test_nothing_is_lost_or_mixed_when_connections_and_servers_fail(s3_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])  # put back afterwards
    happened = Counter()
    for seed in (1, 2):
        happened += survive(s3_folder.server, tmp_path, seed=seed, share=0.15)
    failed = sum(count for name, count in happened.items() if name.startswith("push: "))
    assert happened["published"] + failed == 2 * PUBLICATIONS
    assert sum(happened[f"fault: {fault}"] for fault in FAULTS) > 10, "it was tried"


def test_a_release_that_is_lost_is_noticed(s3_folder, tmp_path, monkeypatch):
    from benchmarks import storage_faults

    def careless(store):
        s3_folder.client.delete_object(Bucket=store.bucket, Key=f"{store.folder}manifest.json")

    read_latest = storage_faults.read_latest
    monkeypatch.setattr(storage_faults, "read_latest", lambda store: careless(store) or read_latest(store))
    with pytest.raises(AssertionError, match="a release is gone"):
        survive(s3_folder.server, tmp_path, seed=3, share=0.0)
