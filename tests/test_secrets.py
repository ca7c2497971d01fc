"""No credential in anything that a run or a command leaves: secrets are planted wherever one is given, and looked for
in every file, on S3, on the Hub, in what is printed and in tracebacks."""

import base64
import contextlib
import os
import tempfile
import traceback
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from acestep_pipeline.cli import main
from acestep_pipeline.errors import one_sentence_errors
from acestep_pipeline.storage.stores import open_store
from tests import hub_server
from tests.hub_server import Hub, serve_hub
from tests.s3_server import ACCESS_KEY, SECRET_KEY
from tests.test_hub import use_endpoint
from tests.test_uploading import check, fake_checkpoint
from tests.training_runs import train_here

HUB_TOKEN, USER, PASSWORD = "hf_canary-token", "canary-user", "canary-password"
SIGNATURE = "X-Amz-Credential=canary-signer&X-Amz-Signature=canary-signature"
PRESIGNED = f"https://bucket.s3.amazonaws.com/music.zip?{SIGNATURE}"
PROXY = f"http://{USER}:{PASSWORD}@127.0.0.1:9"
PLANTED = {
    "HF_TOKEN": HUB_TOKEN,
    "WANDB_API_KEY": "canary-wandb-key",
    "HTTP_PROXY": PROXY,
    "HTTPS_PROXY": PROXY,
    "NO_PROXY": "*",  # of an address with a password in it, clients compare another name than its host's
}
_BASIC = [base64.b64encode(f"{USER}:{PASSWORD}".encode()), base64.b64encode(f":{HUB_TOKEN}".encode())]
# Every secret has the word in it; what a client makes of user and password for a server hasn't.
MARKS = [b"canary", *_BASIC]


def leaks(content: dict[str, bytes]) -> list[str]:
    """Where a secret is: names and contents."""
    found = []
    for name, data in content.items():
        data = name.encode("utf-8", "surrogateescape") + b"\n" + data
        lower = data.lower() + urllib.parse.unquote_to_bytes(data).lower()
        found += [name for mark in MARKS if mark.lower() in lower]
    return found


def below(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones and those of other programs too."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def on_s3(folder) -> dict[str, bytes]:
    """Objects with all that is kept of them."""
    client, bucket = folder.client, folder.server.bucket
    found = {}
    for stored in open_store(folder.url).list_keys():
        answer = client.get_object(Bucket=bucket, Key=f"{folder.name}/{stored.key}")
        kept = {name: value for name, value in answer.items() if name not in ("Body", "ResponseMetadata")}
        found[stored.key] = answer["Body"].read() + repr(kept).encode()
    return found


def on_hub(hub: Hub) -> dict[str, bytes]:
    """Files of every commit, the commits' messages, and the paths that were asked for."""
    found = {"requests": "\n".join(hub.requests).encode()}
    for name, repository in hub.repositories.items():
        found[f"{name} log"] = repr([repository.log, repository.tags, repository.branches]).encode()
        for commit, files in repository.commits.items():
            found |= {f"{name}@{commit}/{path}": file.read_bytes() for path, file in files.items()}
    return found


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A folder in which all that this process writes lands."""
    for name in ("home", "temporary", "hub"):
        (tmp_path / "machine" / name).mkdir(parents=True)
    folder = tmp_path / "machine"
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("TMPDIR", str(folder / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def planted(machine, s3_folder, tmp_path, monkeypatch) -> Iterator[Hub]:
    """Servers that take the planted secrets, and nothing but these in the environment."""
    (tmp_path / "served").mkdir()
    monkeypatch.setitem(hub_server.TOKENS, HUB_TOKEN, {"role": "write"})
    monkeypatch.setenv("ACESTEP_S3_ROOT", s3_folder.url)
    with_password = s3_folder.server.url.replace("://", f"://{USER}:{PASSWORD}@")
    for name, value in (PLANTED | {"AWS_ENDPOINT_URL": with_password}).items():
        monkeypatch.setenv(name, value)
    with serve_hub({}, tmp_path / "served") as hub:
        use_endpoint(monkeypatch, hub.url)
        monkeypatch.setenv("NO_PROXY", PLANTED["NO_PROXY"])
        yield hub
    close_session()


def command(*arguments: object, debug: bool = False) -> int | str:
    """The exit status of `acestep-lora`; its traceback where it ends in one."""
    try:
        main([*(["--debug"] if debug else []), *map(str, arguments)])
    except SystemExit as ended:
        return ended.code
    except Exception as error:
        return "".join(traceback.format_exception(error))
    raise AssertionError("it ends by SystemExit")


def test_a_run_and_the_commands_after_it_leave_no_secret(planted, machine, s3_folder, demo_dir, capfd):
    assert ACCESS_KEY.startswith("canary") and SECRET_KEY.startswith("canary")
    assert command("storage", "sync", demo_dir, f"{s3_folder.url}/music") == 0
    train_here(
        f"{s3_folder.url}/music",
        machine / "run",
        max_train_steps=4,
        checkpointing_steps=2,
        max_train_samples=2,
        max_duration_s=2,
        num_validation_samples=1,
        validation_duration_s=2,
        validation_inference_steps=1,
        report_to="tensorboard",
        push_to_s3="jazz",
        push_to_hub=True,
        hub_model_id="tester/jazz",
        hub_tag="v1",
        license="mit",
    )
    for arguments in (
        ("ls",),
        ("ls", "lora/jazz"),
        ("verify", "lora/jazz", "--all"),
        ("pull", "lora/jazz", "copy"),
        ("sync", f"{s3_folder.url}/lora/jazz", f"{s3_folder.url}/plain"),
        ("sync", f"{s3_folder.url}/plain", "plain"),
        ("push", "run", "lora/jazz", "--force", "--include_checkpoints", "--message", "with state"),
        ("rollback", "lora/jazz", "1"),
        ("gc", "lora"),
        ("init", s3_folder.url, "--dry-run"),
        ("ls", "hf://tester/jazz"),
        ("pull", "hf://tester/jazz@v1", "from_hub"),
        ("push", demo_dir, "--to", "hf://datasets/tester/clips"),
    ):
        assert command("storage", *arguments) == 0, arguments
    command("doctor")
    out, err = capfd.readouterr()
    here, there, hub = below(machine), on_s3(s3_folder), on_hub(planted)
    # It is all there …
    assert {f"run/{name}" for name in ("training_args.json", "metrics.jsonl", "README.md", "loss.png")} <= here.keys()
    assert any(name.startswith("run/checkpoint-4/") for name in here) and any("tfevents" in name for name in here)
    assert "lora/jazz/manifest.json" in there and "lora/jazz/checkpoints/manifest.json" in there
    assert any(name.startswith("tester/jazz@") and name.endswith("/README.md") for name in hub)
    assert "Published" in out and "Intact" in out
    # … and holds none.
    printed = {"stdout": out.encode(), "stderr": err.encode()}
    assert leaks(here | there | hub | printed) == []
    # One that is planted is found, wherever it is.
    places = (machine / "run/metrics.jsonl", machine / "run/logs/x", machine / f"{urllib.parse.quote(PASSWORD)}")
    for place in places:
        place.write_bytes((place.read_bytes() if place.exists() else b"") + f"?{SIGNATURE}".encode())
    s3_folder.put({"lora/jazz/note": SECRET_KEY.encode()})
    hub_file = planted.repositories["tester/jazz"].commits[planted.repositories["tester/jazz"].find("v1")]
    hub_file["note"] = planted.keep(_BASIC[0])
    assert {Path(name).name for name in leaks(below(machine))} == {place.name for place in places}
    assert leaks(on_s3(s3_folder)) == ["lora/jazz/note"] and len(leaks(on_hub(planted))) == 1


WRONG = {
    "secret": {"AWS_SECRET_ACCESS_KEY": "canary-wrong-secret"},
    "key": {"AWS_ACCESS_KEY_ID": "canary-wrong-key"},
    "session token": {"AWS_SESSION_TOKEN": "canary-session-token"},
    "endpoint": {"AWS_ENDPOINT_URL": f"http://{USER}:{PASSWORD}@127.0.0.1:9"},
    "no endpoint": {"AWS_ENDPOINT_URL": f"{USER}:{PASSWORD}@127.0.0.1"},
    "proxy": {"NO_PROXY": "", "AWS_ENDPOINT_URL": "http://example.invalid"},
    "proxy that is none": {"NO_PROXY": "", "HTTP_PROXY": f"{USER}:{PASSWORD}@:x", "AWS_ENDPOINT_URL": "http://a.b"},
    "hub token": {"HF_TOKEN": "hf_canary-wrong"},
    "hub proxy": {"NO_PROXY": ""},
}


@pytest.mark.parametrize("what", WRONG)
def test_failing_commands_and_their_tracebacks_hold_no_secret(what, planted, machine, s3_folder, capfd, monkeypatch):
    fake_checkpoint(machine / "run", 2)
    for name, value in WRONG[what].items():
        monkeypatch.setenv(name, value)
    close_session()  # the client reads the proxies when it is made
    remote, hub = f"{s3_folder.url}/lora/x", "hf://tester/x"
    commands = [
        ("storage", "ls", remote),
        ("storage", "push", "run", remote),
        ("storage", "sync", "run", remote),
        ("generate", "--pretrained_model_name_or_path", "tiny", "--prompt", "x", "--adapter", remote),
        ("storage", "push", "run", hub),
        ("storage", "pull", hub, "copy"),
        ("dataset", "build", "--data-dir", remote, "--output-dir", "built"),
    ]
    commands = [each for each in commands if ("hub" in what) == (hub in each)]
    ended = [command(*each, debug=debug) for each in commands for debug in (False, True)]
    assert all(status in (1, 2) for status in ended[::2]), ended
    assert sum(isinstance(text, str) and "Traceback" in text for text in ended[1::2]) == len(commands), ended
    for changes in ({"push_to_s3": "x"}, {"push_to_hub": True, "hub_model_id": "tester/x"}):
        if ("hub" in what) == ("push_to_hub" in changes):
            with pytest.raises(SystemExit), one_sentence_errors():
                check("music", machine / "other", **changes)
    out, err = capfd.readouterr()
    texts = {f"traceback {number}": str(text).encode() for number, text in enumerate(ended)}
    assert leaks(texts | {"stdout": out.encode(), "stderr": err.encode()} | below(machine)) == [], (out, err, ended)


ADDRESSES = {
    "--train_data_dir": ("train_data_dir", PRESIGNED),
    "--validation_data_dir": ("validation_data_dir", PRESIGNED),
    "--dataset_name": ("dataset_name", PRESIGNED),
    "--pretrained_model_name_or_path": ("pretrained_model_name_or_path", PRESIGNED),
    "--resume_from_checkpoint": ("resume_from_checkpoint", PRESIGNED),
    "--output_dir": ("output_dir", PRESIGNED),
    "--push_to_s3": ("push_to_s3", PRESIGNED),
    "a bucket's key": ("train_data_dir", f"s3://{USER}:{PASSWORD}@bucket/music"),
    "a query": ("train_data_dir", f"s3://bucket/music?{SIGNATURE}"),
    "a hub address": ("train_data_dir", f"hf://{USER}:{PASSWORD}@datasets/a/b"),
}


@pytest.mark.parametrize("flag", ADDRESSES)
def test_an_address_with_a_secret_in_it_is_not_repeated(flag, planted, machine, demo_dir, capfd):
    name, value = ADDRESSES[flag]
    changes = {"train_data_dir": demo_dir, "output_dir": machine / "run"} | {name: value}
    if name == "dataset_name":
        changes["train_data_dir"] = None
    data, output = changes.pop("train_data_dir"), changes.pop("output_dir")
    with pytest.raises(SystemExit) as ended, one_sentence_errors():
        train_here(data, output, **changes)
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and err.splitlines()[-1].startswith("error: "), err
    assert leaks({"stdout": out.encode(), "stderr": err.encode()} | below(machine)) == [], (out, err)


COMMANDS = {
    "pull": ("storage", "pull", PRESIGNED, "copy"),
    "push": ("storage", "push", "run", PRESIGNED),
    "ls": ("storage", "ls", PRESIGNED),
    "sync from": ("storage", "sync", PRESIGNED, "copy"),
    "sync to": ("storage", "sync", "run", PRESIGNED),
    "init": ("storage", "init", PRESIGNED),
    "generate": ("generate", "--pretrained_model_name_or_path", "tiny", "--prompt", "x", "--adapter", PRESIGNED),
    "model": ("generate", "--pretrained_model_name_or_path", PRESIGNED, "--prompt", "x"),
    "build": ("dataset", "build", "--data-dir", PRESIGNED, "--output-dir", "built"),
    "cache": ("cache", "--pretrained_model_name_or_path", "tiny", "--train_data_dir", PRESIGNED),
    "info": ("adapters", "info", PRESIGNED),
    "convert": ("adapters", "convert", PRESIGNED, "converted"),
    "checkpoint": ("convert-checkpoint", PRESIGNED, "converted"),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_no_command_repeats_an_address_with_a_secret_in_it(what, planted, machine, capfd):
    fake_checkpoint(machine / "run", 2)
    with contextlib.suppress(SystemExit):
        main([str(argument) for argument in COMMANDS[what]])
    out, err = capfd.readouterr()
    assert "error" in err and "Traceback" not in err
    assert leaks({"stdout": out.encode(), "stderr": err.encode()} | below(machine)) == [], (out, err)
