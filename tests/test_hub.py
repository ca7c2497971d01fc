"""Publishing on the Hub and fetching from it: the command and the functions, against a server that speaks HTTP."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import load_dataset, load_from_disk
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from acestep_pipeline import storage as interface
from acestep_pipeline.adapters.formats.locate import load_adapter, locate
from acestep_pipeline.adapters.library import AdapterLibrary
from acestep_pipeline.checkpoint_source import resolve_checkpoint
from acestep_pipeline.cli import main
from acestep_pipeline.data.building.build_report import BuildOptions
from acestep_pipeline.data.building.ingest import build_dataset
from acestep_pipeline.data.tracks import load_tracks
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.model_card import ADAPTER_LINE, FOLDER_LINE
from acestep_pipeline.paths import LORA_WEIGHTS_NAME
from acestep_pipeline.storage import hub as hub_module
from acestep_pipeline.storage.hub_address import HubAddress, parse_hub_address
from acestep_pipeline.storage.hub_files import belongs
from acestep_pipeline.storage.hub_pull import pull_from_hub
from acestep_pipeline.storage.hub_push import check_may_push, complete_id, push_to_hub
from tests.hub_server import Hub, serve_hub
from tests.test_publishing import write
from tests.test_storage import content

CANARY = "hf_write"
CARD = f"---\nlicense: mit\n---\n\n```python\n{ADAPTER_LINE}\n```\n```bash\n{FOLDER_LINE}\n```\nmine\n"
RUN = {
    LORA_WEIGHTS_NAME: b"weights" * 1000,
    "peft/adapter_model.safetensors": b"peft",
    "peft/adapter_config.json": b"{}",
    "comfyui/jazz_comfyui.safetensors": b"comfy",
    "best/pytorch_lora_weights.safetensors": b"best",
    "training_args.json": b"{}",
    "metrics.jsonl": b"{}\n",
    "README.md": CARD.encode(),
    "samples/sample-0_with_adapter.wav": b"RIFF",
    "loss.png": b"png",
}
PRIVATE = {
    "checkpoint-5/pytorch_lora_weights.safetensors": b"older",
    "checkpoint-5/optimizer.safetensors": b"moments",
    "optimizer.safetensors": b"moments",
    "finished.json": b"{}",
    "logs/events": b"x",
    "notes.txt": b"my diary",
    ".env": b"HF_TOKEN=canary",
    "samples/.partial-sample-1.wav/x": b"half",
    "peft/optimizer.bin": b"moments",
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub for this process, with a token that may write, and caches of the test's own."""
    (tmp_path / "served").mkdir()
    with serve_hub({}, tmp_path / "served") as served:
        use_endpoint(monkeypatch, served.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", CANARY)
        yield served
    close_session()


def use_endpoint(monkeypatch, url: str) -> None:
    """Have this process's huggingface_hub talk to `url`; it has read its settings when it was imported."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in {"ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    close_session()


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write(tmp_path / "my_run", RUN | PRIVATE)


def storage(capfd, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and the errors of the command."""
    with pytest.raises(SystemExit) as ended:
        main(["storage", *map(str, arguments)])
    out, err = capfd.readouterr()
    return ended.value.code, out, "\n".join(line for line in err.splitlines() if line.startswith("error"))


def test_a_run_is_published_in_one_commit_of_allowed_files_and_nothing_is_sent_twice(hub, run_dir, tmp_path, capfd):
    status, out, err = storage(capfd, "push", run_dir, "--to", "hf://tester/jazz", "--tag", "v1", "--private")
    assert status == 0, err
    assert "Published hf://tester/jazz: commit" in out and "tag v1" in out and "Left out 9 files" in out
    repository = hub.repositories["tester/jazz"]
    assert repository.private and [title.partition(" ")[0] for _, title in repository.log] == ["initial", "Publish"]
    published = hub.files("tester/jazz", "v1")
    assert published.keys() - {".gitattributes"} == RUN.keys()
    assert published[LORA_WEIGHTS_NAME] == RUN[LORA_WEIGHTS_NAME]
    card = published["README.md"].decode()
    assert 'adapter = "tester/jazz"\n' in card and "hf download tester/jazz --local-dir jazz\nADAPTER=jazz\n" in card
    assert "mine" in card and (run_dir / "README.md").read_bytes() == RUN["README.md"]

    sent = list(hub.uploads)
    status, out, _ = storage(capfd, "push", run_dir, "--to", "hf://tester/jazz", "--tag", "v1")
    assert status == 0 and "nothing was sent" in out and hub.uploads == sent and len(repository.log) == 2

    (run_dir / "training_args.json").write_text('{"rank": 8}')
    shutil.move(run_dir / "samples/sample-0_with_adapter.wav", run_dir / "samples/sample-1_with_adapter.wav")
    status, _, err = storage(capfd, "push", run_dir, "hf://tester/jazz", "--tag", "v1")
    assert status == 2 and "has a tag v1 already" in err and len(repository.log) == 2
    status, out, _ = storage(capfd, "push", run_dir, "hf://tester/jazz", "--tag", "v2", "--message", "take two")
    assert status == 0 and "2 files of" in out and hub.uploads == sent, "a file under another name is not sent again"
    assert repository.log[-1][1] == "take two"
    now, before = hub.files("tester/jazz"), hub.files("tester/jazz", "v1")
    assert "samples/sample-1_with_adapter.wav" in now and "samples/sample-0_with_adapter.wav" not in now
    assert "samples/sample-0_with_adapter.wav" in before

    out = storage(capfd, "ls", "hf://tester/jazz")[1]
    assert "tag v1: commit" in out and "tag v2: commit" in out and "comfyui/jazz_comfyui.safetensors" in out
    copy = tmp_path / "copy"
    status, out, err = storage(capfd, "pull", "hf://tester/jazz", copy, "--version", "v1")
    assert status == 0 and content(copy) == before, err
    assert storage(capfd, "pull", "hf://tester/jazz", copy)[0] == 2
    assert storage(capfd, "pull", "hf://tester/jazz@v1", copy, "--force")[0] == 0
    (copy / "mine.txt").write_text("mine")
    status, _, err = storage(capfd, "pull", "hf://tester/jazz", copy, "--force")
    assert status == 2 and "mine.txt" in err and (copy / "mine.txt").exists()
    assert not list(tmp_path.glob(".partial-*"))


def test_what_others_put_into_the_repository_stays(hub, run_dir):
    push_to_hub(run_dir, parse_hub_address("hf://tester/jazz"))
    repository = hub.repositories["tester/jazz"]
    head = repository.find("main")
    repository.commits[head]["demo.mp4"] = hub.keep(b"a video")
    (run_dir / "README.md").unlink()
    (run_dir / "loss.png").unlink()
    release = push_to_hub(run_dir, parse_hub_address("hf://tester/jazz"))
    files = hub.files("tester/jazz")
    assert release.is_new and "loss.png" not in files and {"demo.mp4", "README.md"} <= files.keys()
    branch = push_to_hub(run_dir, parse_hub_address("hf://tester/jazz@trial"))
    assert not branch.is_new and repository.find("trial") == repository.find("main")


def test_allowed_files():
    refused = [*PRIVATE, "checkpoint-5/README.md", "peft/deep/adapter_model.safetensors", "training_args.json.bak"]
    from acestep_pipeline.storage.release_manifest import _is_left_out

    assert all(belongs(name, "model") for name in RUN)
    assert not [name for name in refused if belongs(name, "model") and not _is_left_out(name, False)]


def test_datasets_are_published_and_read_again(hub, demo_dir, tmp_path, capfd):
    build_dataset([demo_dir], tmp_path / "built", BuildOptions())
    status, out, err = storage(capfd, "push", tmp_path / "built", "--to", "hf://datasets/tester/clips")
    assert status == 0, err
    assert "README.md" in hub.files("datasets/tester/clips")
    here, _ = load_tracks(tmp_path / "built")
    there, _ = load_tracks("hf://datasets/tester/clips")
    assert [(t.id, t.sha256, t.tags) for t in here] == [(t.id, t.sha256, t.tags) for t in there]
    assert "nothing was sent" in storage(capfd, "push", tmp_path / "built", "hf://datasets/tester/clips")[1]
    # What the card's metadata say is enough for others, too.
    assert storage(capfd, "pull", "hf://datasets/tester/clips", tmp_path / "copy")[0] == 0
    (tmp_path / "copy/state.json").unlink()  # for which `load_dataset` refuses a folder, not a repository
    loaded = load_dataset(str(tmp_path / "copy"), cache_dir=str(tmp_path / "datasets"))
    assert loaded["train"]["id"] == [track.id for track in here]
    assert loaded["train"].features.keys() >= {"audio", "tags"}

    # As somebody else would have put it there.
    (tmp_path / "parquet/data").mkdir(parents=True)
    load_from_disk(str(tmp_path / "built")).to_parquet(tmp_path / "parquet/data/train-00000-of-00001.parquet")
    push_to_hub(tmp_path / "parquet", parse_hub_address("hf://datasets/tester/parquet"))
    there, _ = load_tracks("hf://datasets/tester/parquet")
    assert [(t.id, t.sha256, t.tags) for t in here] == [(t.id, t.sha256, t.tags) for t in there]

    # A folder of audio, and a folder in a repository.
    (tmp_path / "raw").mkdir()
    shutil.copytree(demo_dir, tmp_path / "raw" / "[demo]")
    push_to_hub(tmp_path / "raw", parse_hub_address("hf://datasets/tester/raw"))
    there, _ = load_tracks("hf://datasets/tester/raw/[demo]")
    here, _ = load_tracks(demo_dir)
    assert [(t.id, t.sha256, t.tags) for t in here] == [(t.id, t.sha256, t.tags) for t in there]

    build_dataset([demo_dir], tmp_path / "linked", BuildOptions(link=True))
    status, _, err = storage(capfd, "push", tmp_path / "linked", "--to", "hf://datasets/tester/linked")
    assert status == 2 and "without --link" in err and "datasets/tester/linked" not in hub.repositories


def test_adapters_and_checkpoints_are_read_from_hf_addresses(hub, tiny_dir, tmp_path, monkeypatch):
    from acestep_pipeline.adapters.settings import LoraSettings
    from tests.test_adapters import save_trained

    save_trained(tiny_dir, tmp_path / "shelf/jazz", LoraSettings(r=2, lora_alpha=6.0), 0)
    push_to_hub(tmp_path / "shelf/jazz", parse_hub_address("hf://tester/jazz"), tag="v1", private=True)
    hub.add("someone/tiny", {"main": tiny_dir})
    weights = (tmp_path / "shelf/jazz" / LORA_WEIGHTS_NAME).read_bytes()
    for address in ("hf://tester/jazz", "hf://tester/jazz@v1", f"hf://tester/jazz/{LORA_WEIGHTS_NAME}"):
        assert locate(address).read_bytes() == weights
    assert load_adapter("hf://tester/jazz", revision="v1").modules
    hub.add("tester/shelf", {"main": tmp_path / "shelf"})
    for library in (AdapterLibrary(["hf://tester/jazz@v1"]), AdapterLibrary("hf://tester/shelf")):
        (name,) = library.names()
        assert library.fetch(name).read_bytes() == weights
    found = resolve_checkpoint("hf://someone/tiny")
    assert (found / "model_index.json").is_file()
    with pytest.raises(UsageError, match="--variant_dir"):
        resolve_checkpoint("hf://someone/tiny/transformer")
    # While the Hub is down, the cache serves, and what it lacks is said.
    use_endpoint(monkeypatch, f"http://127.0.0.1:{free_port()}")
    assert locate("hf://tester/jazz@v1").read_bytes() == weights
    with pytest.raises(UsageError, match="can't be reached .*127.0.0.1"):
        locate("hf://tester/never")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


REFUSED = {
    "no token": (None, "hf://tester/x", 2, ("no token", "HF_TOKEN", "hf auth login")),
    "bad token": ("hf_wrong", "hf://tester/x", 2, ("refuses the token",)),
    "read-only": ("hf_read", "hf://tester/x", 2, ("may not write", "write access")),
    "fine-grained, to read": ("hf_fine_read", "hf://tester/x", 2, ("may not write",)),
    "somebody else's name": ("hf_write", "hf://somebody/x", 2, ("it is of tester, band",)),
    "somebody else's repository": ("hf_write", "hf://somebody/there", 2, ("may not write there (403)",)),
    "public": ("hf_write", "hf://tester/public", 2, ("is public",)),
    "no name": ("hf_write", "hf://tester", 2, ("no address on the Hub",)),
    "bad name": ("hf_write", "hf://tester/a b\n", 2, ("no address on the Hub",)),
    "a space": ("hf_write", "hf://spaces/tester/x", 2, ("is a space",)),
    "a folder": ("hf_write", "hf://tester/x/deep", 2, ("names a folder",)),
    "a dataset's address": ("hf_write", "hf://datasets/tester/x", 2, ("is an adapter",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_published_is_refused_in_one_sentence(case, hub, run_dir, tmp_path, monkeypatch, capfd):
    token, address, expected, said = REFUSED[case]
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for name in ("somebody/there", "tester/public"):
        hub.add(name, {"main": run_dir})
    status, _, err = storage(capfd, "push", run_dir, "--to", address, "--private")
    assert status == expected and all(part in err for part in said) and err.count("\n") == 0, err
    assert not token or token not in err
    assert not [line for line in hub.requests if line.startswith("POST") and "create" not in line]


FAULTS = {
    "401": (r"POST .*/preupload", 401, 2, "refuses the token"),
    "403": (r"POST .*/commit/", 403, 2, "may not write there (403)"),
    "412": (r"POST .*/commit/", 412, 1, "another commit came first"),
    "409": (r"POST .*/commit/", 409, 1, "another commit came first"),
    "429": (r"GET .*/tree/", 429, 1, "no more requests"),
    "500": (r"POST .*/commit/", 500, 1, "busy or broken (500)"),
    "tag": (r"POST .*/tag/", 503, 1, "is published, but not tagged v1"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_goes_wrong_meanwhile_is_one_sentence(case, hub, run_dir, capfd, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own retries
    pattern, code, expected, said = FAULTS[case]
    hub.faults += [(pattern, code)] * 9
    status, _, err = storage(capfd, "push", run_dir, "--to", "hf://tester/jazz", "--tag", "v1")
    assert status == expected and said in err and err.count("\n") == 0, err
    hub.faults.clear()
    assert storage(capfd, "push", run_dir, "--to", "hf://tester/jazz", "--tag", "v1")[0] == 0
    assert len(hub.repositories["tester/jazz"].log) == 2 and hub.files("tester/jazz", "v1")


def test_of_two_publishers_one_wins_and_the_other_is_told(hub, run_dir, tmp_path, monkeypatch):
    address = parse_hub_address("hf://tester/jazz")
    other = write(tmp_path / "other", RUN | {"metrics.jsonl": b"another"})
    push_to_hub(run_dir, address)
    (run_dir / "training_args.json").write_text("1")
    create_commit = hub_module.HfApi.create_commit

    def late(self, *args, **kwargs):
        monkeypatch.setattr(hub_module.HfApi, "create_commit", create_commit)
        push_to_hub(other, address)
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(hub_module.HfApi, "create_commit", late)
    with pytest.raises(RunError, match="another commit came first"):
        push_to_hub(run_dir, address)
    assert len(hub.repositories["tester/jazz"].log) == 3 and hub.files("tester/jazz")["metrics.jsonl"] == b"another"


def test_reading_what_is_not_there(hub, run_dir, tmp_path, capfd, monkeypatch):
    hub.add("somebody/secret", {"main": run_dir}, private=True)
    wrong = {
        "hf://tester/never": "no model 'tester/never'",
        "hf://datasets/tester/never": "no dataset 'tester/never'",
        "hf://somebody/secret@v9": "revision 'v9'",
        "hf://somebody/secret/deep": "correct the folder's name",
    }
    for address, said in wrong.items():
        status, _, err = storage(capfd, "ls", address)
        assert status == 2 and said in err, err
    assert storage(capfd, "pull", "hf://tester/never", tmp_path / "x")[0] == 2 and not (tmp_path / "x").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    status, _, err = storage(capfd, "ls", "hf://somebody/secret")
    assert status == 2 and "refuses the token" in err and "hf_wrong" not in err
    for action in ("verify", "gc"):
        status, _, err = storage(capfd, action, "hf://tester/jazz")
        assert status == 2 and "only push, pull, sync and ls" in err


def test_a_pull_checks_what_arrives_and_where_it_would_go(hub, run_dir, tmp_path):
    push_to_hub(run_dir, parse_hub_address("hf://tester/jazz"))
    repository = hub.repositories["tester/jazz"]
    files = repository.commits[repository.find("main")]
    evil = dict(files) | {"../../evil": files["metrics.jsonl"]}
    repository.commits[repository.find("main")] = evil
    with pytest.raises(UsageError, match="no safe file name"):
        pull_from_hub(parse_hub_address("hf://tester/jazz"), tmp_path / "copy")
    repository.commits[repository.find("main")] = files
    weights = files[LORA_WEIGHTS_NAME]
    kept, size = weights.read_bytes(), weights.stat()
    hub.faults.append((r"^never", 0))
    from tests import hub_server

    described = hub_server._describe(weights, LORA_WEIGHTS_NAME)  # the tree's hash is of the right content
    weights.write_bytes(b"x" * len(kept))
    os.utime(weights, ns=(size.st_atime_ns, size.st_mtime_ns))
    assert hub_server._describe(weights, LORA_WEIGHTS_NAME) == described
    with pytest.raises(RunError, match="another hash"):
        pull_from_hub(parse_hub_address("hf://tester/jazz"), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    weights.write_bytes(kept)
    os.utime(weights, ns=(size.st_atime_ns, size.st_mtime_ns))
    pull_from_hub(parse_hub_address("hf://tester/jazz"), tmp_path / "copy")
    assert (tmp_path / "copy" / LORA_WEIGHTS_NAME).read_bytes() == kept


@pytest.mark.parametrize("way", ["refused", "no answer"])
def test_a_hub_that_is_not_there_is_named_within_15_s(way, run_dir, tmp_path, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if way == "no answer" else free_port()
        use_endpoint(monkeypatch, f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", CANARY)
        commands = [("push", run_dir, "--to", "hf://tester/x"), ("ls", "hf://tester/x")]
        for command in commands[: 1 if way == "no answer" else None]:
            began = time.monotonic()
            status, _, err = storage(capfd, *command)
            assert status == 2 and f"127.0.0.1:{port}" in err and "can't be reached" in err, err
            assert time.monotonic() - began < 15
    close_session()


def test_names_are_completed_by_the_token(hub):
    assert complete_id(None, default="c-my music") == "tester/c-my-music"
    assert complete_id("jazz", default="x") == "tester/jazz" and complete_id("band/jazz", default="x") == "band/jazz"
    check_may_push(HubAddress("band/jazz", "model"))
    assert parse_hub_address("hf://datasets/a/b@refs/pr/3/x/y") == HubAddress("a/b", "dataset", "refs/pr/3", "x/y")
    assert str(parse_hub_address("hf://datasets/a/b@v1/x")) == "hf://datasets/a/b@v1/x"


def test_one_interface(hub, run_dir, tmp_path):
    assert not interface.exists("hf://tester/jazz")
    assert interface.push(run_dir, "hf://tester/jazz", version="v1", private=True) == "v1"
    assert hub.repositories["tester/jazz"].private
    listed = {file.key: file.size for file in interface.list("hf://tester/jazz/samples")}
    assert listed == {"sample-0_with_adapter.wav": 4}
    assert interface.exists("hf://tester/jazz@v1") and not interface.exists("hf://tester/jazz/nothing")
    assert interface.exists(f"hf://tester/jazz/{LORA_WEIGHTS_NAME}") and not interface.exists("hf://tester/jazz@v2")
    with interface.open("hf://tester/jazz/peft/adapter_model.safetensors") as file:
        assert file.read() == b"peft"
    with pytest.raises(UsageError, match="is no file that is there"):
        interface.open("hf://tester/jazz/peft/other")
    copy = content(interface.pull("hf://tester/jazz", tmp_path / "copy", version="v1"))
    assert copy["peft/adapter_model.safetensors"] == b"peft"
    with pytest.raises(UsageError, match="hf://"):
        interface.list("gs://a")
