"""`acestep-lora storage`, as a user meets it: what it prints, refuses and leaves, against a real S3 server."""

import json
import re
import time
from pathlib import Path

import pytest

from acestep_pipeline.cli import main
from acestep_pipeline.errors import UsageError
from acestep_pipeline.storage.names import address_of
from acestep_pipeline.storage.release_manifest import MANIFEST_NAME, check_names, files_to_publish, parse_manifest
from acestep_pipeline.storage.stores import open_store
from tests.test_publishing import write
from tests.test_storage import content

RUN = {
    "pytorch_lora_weights.safetensors": b"weights" * 1000,
    "training_args.json": b"{}",
    "checkpoint-5/pytorch_lora_weights.safetensors": b"older",
    "checkpoint-5/optimizer.safetensors": b"moments",
    "best/optimizer.bin": b"moments",
    ".env": b"AWS_SECRET_ACCESS_KEY=canary",
    ".git/config": b"canary",
}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write(tmp_path / "my_run", RUN)


@pytest.fixture
def root(s3_folder, monkeypatch):
    monkeypatch.setenv("ACESTEP_S3_ROOT", s3_folder.url)
    return s3_folder


def storage(capfd, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr (without bars) of the command."""
    with pytest.raises(SystemExit) as ended:
        main(["storage", *map(str, arguments)])
    out, err = capfd.readouterr()
    return ended.value.code, out, "\n".join(line for line in err.splitlines() if line.startswith("error"))


def test_a_run_is_pushed_listed_pulled_verified_and_rolled_back(root, run_dir, tmp_path, capfd):
    status, out, _ = storage(capfd, "push", run_dir, "lora/jazz", "--version", "v1", "--message", "first take")
    assert status == 0 and re.search(r"Published s3://\S+/lora/jazz: release 1 v1, 2 files, 0.0 MB", out)
    assert "Left out 5 files" in out and "--include_checkpoints" in out
    assert storage(capfd, "push", run_dir, "lora/jazz", "--version", "v1")[1].count("nothing was sent") == 1
    (run_dir / "training_args.json").write_text('{"rank": 8}')
    status, _, err = storage(capfd, "push", run_dir, "lora/jazz")
    assert status == 2 and "is published already" in err and "--force" in err
    assert storage(capfd, "push", run_dir, "lora/jazz", "--force", "--include_checkpoints")[0] == 0
    assert storage(capfd, "push", run_dir, "datasets/réel_1")[0] == 0
    status, out, _ = storage(capfd, "ls")
    assert (
        status == 0 and re.search(r"^lora/jazz  release 2, 5 files", out, re.M) and "datasets/réel_1  release" in out
    )
    assert "lora/jazz" in storage(capfd, "ls", "lora")[1]
    out = storage(capfd, "ls", "lora/jazz")[1]
    assert re.search(r"^release 2, .*\nrelease 1 v1, .*\(first take\)\n", out) and "checkpoint-5/optimizer" in out
    copy = tmp_path / "my_adapter"
    status, out, _ = storage(capfd, "pull", "lora/jazz", copy, "--version", "v1")
    assert status == 0 and "release 1 v1" in out and (copy / "training_args.json").read_text() == "{}"
    assert set(content(copy)) == {"pytorch_lora_weights.safetensors", "training_args.json", MANIFEST_NAME}
    assert storage(capfd, "pull", "lora/jazz", copy)[0] == 2
    assert storage(capfd, "pull", "lora/jazz", copy, "--force")[0] == 0
    assert content(copy)["checkpoint-5/optimizer.safetensors"] == b"moments"
    assert "Intact: release 2" in storage(capfd, "verify", str(copy))[1], "a pulled copy can be verified as well"
    status, out, _ = storage(capfd, "rollback", "lora/jazz", "v1")
    assert status == 0 and "release 3, 2 files" in out and "(release 1 again)" in out
    assert storage(capfd, "verify", "lora/jazz", "--all")[1].count("Intact") == 3
    assert "removed 0 objects" in storage(capfd, "gc", "lora")[1]
    assert "would remove 0 objects" in storage(capfd, "gc", "lora/jazz", "--dry-run")[1]
    for stored in open_store(f"{root.url}/lora/jazz").list_keys("content/"):
        root.put({f"lora/jazz/{stored.key}": b"x" * stored.size})
    status, out, err = storage(capfd, "verify", "lora/jazz")
    assert status == 1 and "has another SHA-256" in out and "2 files are not what was published" in err
    everything = b"".join(root.client.get_object(Bucket=root.server.bucket, Key=f"{root.name}/lora/jazz/{file.key}")
                          ["Body"].read() for file in open_store(f"{root.url}/lora/jazz").list_keys())  # fmt: skip
    assert b"canary" not in everything


def test_a_shared_folder_can_be_the_root(run_dir, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("ACESTEP_S3_ROOT", str(tmp_path / "disk"))
    assert storage(capfd, "push", run_dir, "lora/loo-subsets/a")[0] == 0
    assert "lora/loo-subsets/a  release 1" in storage(capfd, "ls")[1]
    assert storage(capfd, "pull", "lora/loo-subsets/a", tmp_path / "copy")[0] == 0
    assert (tmp_path / "copy" / "training_args.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "name",
    ["lora/my adapter", "lora/🎵", "lora/a\nb", "loras/x", "lora", "", "lora/../x", "lora/.x", "lora/content", "x"],
)
def test_a_name_that_is_none_is_one_sentence(name, run_dir, capfd, monkeypatch):
    monkeypatch.setenv("ACESTEP_S3_ROOT", "s3://nowhere")
    status, out, err = storage(capfd, "push", run_dir, name)
    assert status == 2 and out == "" and "is no name to publish under: write models/, lora/" in err


def test_names_and_addresses(monkeypatch):
    monkeypatch.setenv("ACESTEP_S3_ROOT", "s3://bucket/team/")
    assert address_of("lora/x") == "s3://bucket/team/lora/x" and address_of("", partly=True) == "s3://bucket/team"
    assert address_of("s3://other/x y") == "s3://other/x y" and address_of("./x") == "./x"
    monkeypatch.delenv("ACESTEP_S3_ROOT")
    with pytest.raises(UsageError, match="ACESTEP_S3_ROOT is not set: set it to s3://your-bucket"):
        address_of("lora/x")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "canary-1"}, "the credentials are wrong; set AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "canary-2"}, "the credentials are not known at http://127.0.0.1:"),
        ({"AWS_ACCESS_KEY_ID": None}, "no credentials (NoCredentialsError); set AWS_ACCESS_KEY_ID"),
        ({"ACESTEP_S3_ROOT": "s3://no-such-bucket"}, "s3://no-such-bucket/lora/x: there is no such bucket at http:"),
        ({"ACESTEP_S3_ROOT": "s3://k:canary-3@bucket"}, "is not an address; write s3://bucket/folder"),
        ({"AWS_ENDPOINT_URL": "http://u:canary-4@127.0.0.1:1"}, "http://127.0.0.1:1 can't be reached"),
    ],
)
@pytest.mark.parametrize("action", ["push", "pull", "ls", "gc"])
def test_what_s3_refuses_is_one_sentence_without_secrets(action, settings, said, root, run_dir, capfd, monkeypatch):
    for name, value in settings.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    arguments = {"push": [run_dir, "lora/x"], "pull": ["lora/x", run_dir / "c"], "ls": ["lora/x"], "gc": ["lora/x"]}
    begun = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main(["storage", action, *map(str, arguments[action])])
    assert time.monotonic() - begun < 15
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and said in err and err.count("\n") == 1 and "canary" not in out + err


# --- names in manifests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../x", "leads elsewhere"),
        ("a/../../x", "leads elsewhere"),
        ("a/./x", "leads elsewhere"),
        ("a//x", "leads elsewhere"),
        ("a/", "leads elsewhere"),
        ("", "leads elsewhere"),
        ("/etc/x", "absolute"),
        ("C:/x", "absolute"),
        ("c:x", "absolute"),
        ("..\\x", "backslash"),
        ("a\nb", "line break"),
        ("a\0b", "line break"),
        ("NUL", "device"),
        ("samples/aux.wav", "device"),
        ("Com1.txt/x", "device"),
        ("x" * 256, "longer than 255 bytes"),
        ("\udcff", "not UTF-8"),
        (MANIFEST_NAME, "manifest's own"),
    ],
)
def test_a_name_that_could_lead_out_of_the_folder_is_refused(root, name, reason, tmp_path, capfd):
    entry = f'{{"file": {json.dumps(name)}, "size": 1, "sha256": "{"0" * 64}"}}'
    facts = '"content": "content", "release": 1'
    root.put({"lora/evil/manifest.json": f'{{{facts}, "files": [{entry}]}}'.encode()})
    status, _, err = storage(capfd, "pull", "lora/evil", tmp_path / "copy")
    assert status == 2 and "is no safe file name" in err and reason in err and err.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_names_of_music_are_safe():
    check_names(["What?.wav", "01: a song.flac", "日本語/🎵 曲.ogg", "auxiliary.wav", "...wav", "console/x"], "x")
    with pytest.raises(UsageError, match="'a' is a file and a folder at once"):
        check_names(["a/b", "a"], "x")
    with pytest.raises(UsageError, match="'a' is there twice"):
        check_names(["a", "a"], "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"files": [1]}',
        b"[" * 100_000,
        b"\xff",
        b'{"files": [{"file": "a", "size": -1, "sha256": "%064d"}]}' % 0,
        b'{"files": [{"file": "a", "size": 1e3, "sha256": "%064d"}]}' % 0,
        b'{"files": [{"file": "a", "size": 99999999999999999, "sha256": "%064d"}]}' % 0,
        b'{"files": [{"file": "a", "size": 1, "sha256": "../../x"}]}',
        b'{"files": [{"file": 1, "size": 1, "sha256": "%064d"}]}' % 0,
        b'{"files": [], "content": "../other", "release": 1}',
        b'{"files": [], "content": "content"}',
        b'{"files": [], "release": "1"}',
    ],
)
def test_a_damaged_manifest_is_one_sentence(data):
    with pytest.raises(UsageError, match=r"^x (can't be read \(\w+\)|is damaged: .*); publish it again\.$"):
        parse_manifest(data, "x")


def test_what_is_published_of_a_folder(run_dir, tmp_path):
    assert files_to_publish(run_dir)[0] == ["pytorch_lora_weights.safetensors", "training_args.json"]
    assert len(files_to_publish(run_dir, include_checkpoints=True)[0]) == 5
    with pytest.raises(UsageError, match="is no folder"):
        files_to_publish(tmp_path / "none")
    write(tmp_path / "state", {"optimizer.bin": b""})
    with pytest.raises(UsageError, match="holds no files to publish; .*--include_checkpoints"):
        files_to_publish(tmp_path / "state")
    (run_dir / "linked").symlink_to(tmp_path / "state")
    with pytest.raises(UsageError, match="linked is no file"):
        files_to_publish(run_dir)
    (run_dir / "linked").unlink()
    write(run_dir, {"a\nb": b""})
    with pytest.raises(UsageError, match="line break"):
        files_to_publish(run_dir)
