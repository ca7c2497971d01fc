"""MODE=lambda, AWS's runtime client with our handler, against a Runtime API on loopback: `make serverless-test`."""

import base64
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.lambda_runtime import running_runtime

pytestmark = [pytest.mark.slow, pytest.mark.vendors]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def function(s3_folder, adapter_dir, tmp_path):
    """The function, running as in its container; yields what invokes it. Its log is log.txt."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACESTEP_")}
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "ACESTEP_S3_ROOT": s3_folder.url}
    environment |= {"ACESTEP_JOBS_DATA": str(adapter_dir.parent), "MODE": "lambda"}
    with running_runtime() as runtime, (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "acestep_pipeline.container"],
            env=environment | {"AWS_LAMBDA_RUNTIME_API": runtime.address},
            stdout=log,
            stderr=log,
        )
        try:
            yield runtime.invoke
        finally:
            process.kill()
            process.wait()


def test_a_dataset_is_examined_and_its_reports_are_linked(function, demo_dir, s3_folder, tmp_path):
    for path in demo_dir.iterdir():
        s3_folder.put({f"music/{path.name}": path.read_bytes()})
    s3_folder.put({"music/broken.flac": b"fLaC" + bytes(100)})
    job = {"task": "validate_dataset", "data": f"{s3_folder.url}/music", "upload": f"{s3_folder.url}/results/x"}
    result = function(job)
    assert result["status"] == "done" and result["tracks"] == 6 and result["rejected"] == 1
    links = {file["file"]: file["url"] for file in result["results"]["files"]}
    assert links.keys() == {"dataset_card.md", "report.html", "report.json"}
    with urllib.request.urlopen(links["report.html"]) as answer:
        assert b"broken" in answer.read()
    assert not list((tmp_path / "output" / ".jobs").iterdir())
    assert "X-Amz-Signature" not in (tmp_path / "log.txt").read_text()


def test_an_adapter_is_converted_and_described_over_http_too(function, adapter_dir):
    job = {"task": "convert_adapter", "adapter": adapter_dir.name, "to": "peft"}
    converted = function(job)
    assert [file["file"] for file in converted["results"]["files"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    body = json.dumps(job | {"task": "describe_adapter"} | {"to": None})
    answer = function({"requestContext": {}, "body": body})
    assert answer["statusCode"] == 400 and "to is no field" in json.loads(answer["body"])["error"]
    body = json.dumps({"task": "describe_adapter", "adapter": adapter_dir.name}).encode()
    answer = function({"requestContext": {}, "body": base64.b64encode(body).decode(), "isBase64Encoded": True})
    assert answer["statusCode"] == 200 and json.loads(answer["body"])["layers"] == converted["layers"]
    assert function({"requestContext": {}, "body": "{"})["statusCode"] == 400


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"task": "train", "data": "s3://bucket/x"}, "task must be one of validate_dataset"),
        ({"task": "generate", "prompt": "x"}, "task must be one of validate_dataset"),
        ({"task": "validate_dataset", "data": "http://169.254.169.254/"}, "can't be read by a job"),
        ([], "must be an object"),
    ],
)
def test_other_jobs_are_refused_in_one_sentence(function, job, said):
    answer = function(job)
    assert answer["status"] == "refused" and said in answer["error"]
