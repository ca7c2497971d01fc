"""What a store costs: counted on a real server, multiplied by prices of a file that a user fills in."""

import pytest
import yaml

from acestep_pipeline.errors import UsageError
from acestep_pipeline.storage.costs import GB, TEMPLATE, Prices, cost_of, count_holdings, read_prices, summarise, table
from acestep_pipeline.storage.publishing import publish
from tests.test_publishing import write
from tests.test_storage_command import root, storage  # noqa: F401

LISTED = {"gb_month": 0.02, "put_1000": 5.0, "get_1000": 0.4, "retrieval_gb": 0.0}


def test_what_was_published_is_counted_and_costs_what_the_file_says(root, tmp_path, capfd):  # noqa: F811
    run = write(tmp_path / "run", {"a": b"x" * 1000, "b": b"y" * 500})
    publish(run, f"{root.url}/lora/jazz", show_progress=False)
    publish(run, f"{root.url}/lora/jazz/checkpoints", show_progress=False)
    root.put({"music/a.wav": b"z" * 2000})
    status, out, _ = storage(capfd, "cost")
    assert status == 0 and "With prices: acestep-lora storage cost --template" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    # Of a release: two contents, its manifest, and what tried conditional writes.
    assert lines["lora"][1:4] == ["STANDARD", "4", "0"] and lines["lora/…/checkpoints"][1:3] == ["STANDARD", "4"]
    assert lines["other"][1:3] == ["STANDARD", "1"] and lines["all"][1] == "9"

    status, out, _ = storage(capfd, "cost", "--template")
    assert status == 0 and out == TEMPLATE
    prices = tmp_path / "prices.yaml"
    prices.write_text(out)
    out = storage(capfd, "cost", "--prices", prices)[1]
    assert "the price list lacks prices of STANDARD, or of transfer" in out and "?" in out, "none is invented"
    filled = yaml.safe_load(TEMPLATE)
    filled |= {"region": "eu-central-1", "as_of": "2026-11-01", "transfer_out_gb": 0.09}
    filled["classes"]["STANDARD"] = LISTED
    prices.write_text(yaml.safe_dump(filled))
    status, out, _ = storage(capfd, "cost", "lora", "--prices", prices)
    assert status == 0 and "Prices: eu-central-1, 2026-11-01" in out and "?" not in out and "USD a month" in out
    # 4 objects and a LIST at 5 a thousand; what a month of 1.5 kB costs is less than can be shown.
    (row,) = [line.split() for line in out.splitlines() if line.startswith("lora/…")]
    assert row[-3:] == ["0.0000", "0.0250", "0.0016"]


def test_old_versions_are_paid_for(s3_server, s3_folder):
    bucket = f"versions-{s3_folder.name}"
    s3_server.client.create_bucket(Bucket=bucket)
    s3_server.client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for content in (b"1" * 100, b"2" * 300):
        s3_server.client.put_object(Bucket=bucket, Key="lora/x/a", Body=content)
    (holding,) = count_holdings(f"s3://{bucket}")
    assert (holding.num_objects, holding.num_old, holding.size, holding.current_size) == (2, 1, 400, 300)
    assert holding.num_gets == 1


def test_the_sums():
    prices = Prices("USD", "", {"STANDARD": LISTED, "COLD": {**LISTED, "retrieval_gb": 0.01}}, 0.09)
    large = summarise("lora", "STANDARD", [(GB, True), (10, True), (GB, False)])
    assert (large.num_puts, large.num_gets) == (128 + 2 + 1 + 1, 128 + 1)
    cost = cost_of(large, prices)
    assert cost.month == pytest.approx(0.04) and cost.push == pytest.approx(132 * 0.005)
    assert cost.pull == pytest.approx(129 * 0.0004 + 0.09)
    assert cost_of(summarise("results", "COLD", [(GB, True)]), prices).pull == pytest.approx(128 * 0.0004 + 0.1)
    assert cost_of(summarise("results", "GLACIER", [(GB, True)]), prices).month is None
    assert table([large], prices)[-1].split()[-3:] == ["0.0400", "0.6600", "0.1416"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("classes: [", "is no YAML"),
        ("[]", "is no price list"),
        ("{classes: {STANDARD: {gb_month: cheap}}}", "gb_month is 'cheap', which is no price"),
        ("{classes: {STANDARD: {gb_month: -1}}}", "gb_month is '-1', which is no price"),
        ("{classes: {STANDARD: {gb_mnth: 1}}}", "not gb_mnth"),
        ("{classes: {STANDARD: 3}}", "not it"),
        ("{classes: {}, transfer: 1}", "is no price list"),
    ],
)
def test_a_wrong_price_list_is_one_sentence(text, said, tmp_path):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(UsageError, match=said) as refused:
        read_prices(tmp_path / "prices.yaml")
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="can't be read"):
        read_prices(tmp_path / "none.yaml")


def test_only_s3_has_prices(tmp_path, capfd):
    status, _, err = storage(capfd, "cost", tmp_path)
    assert status == 2 and "is no bucket, and a folder has no prices" in err
