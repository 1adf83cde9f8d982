"""What goes wrong between here and the Hub: one clear error or a retry that ends well, and nothing half-written."""

import copy
import errno
import io
import json
import pathlib
import threading

import huggingface_hub.constants
import pytest
import torch
from hub import server

import timm_csg
from timm_csg import CheckpointError, HubError

BOTH = ("standard", "gated")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Retries wait; here not for long."""
    import time

    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


def same(found, expected, images, targets):
    found, expected = found(images, targets, paths=BOTH), expected(images, targets, paths=BOTH)
    return torch.equal(found.standard, expected.standard) and torch.equal(found.gated, expected.gated)


def leftovers(tmp_path):
    """Files in the cache that look finished: a later load would take them for whole."""
    return [path for path in (tmp_path / "cache").rglob("snapshots/*/**/*") if path.is_file()]


# Who may do what


def test_push_without_token_says_how_to_get_one(regular_hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no token. Log in with 'hf auth login', set HF_TOKEN, or pass token"):
        timm_csg.push_to_hub(model, "user/tiny")
    assert regular_hub.requests() == []


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_wrong", "the Hub does not accept the token; log in again"),
        ("hf_read", "the token lacks permission; create one with write access.*The Hub says"),
        ("hf_other", "the token lacks permission"),
    ],
)
def test_push_with_the_wrong_token_says_so(regular_hub, model, token, words):
    repo = regular_hub.add_repo("user/tiny")
    for repo_id in ("user/tiny", "user/new"):
        with pytest.raises(HubError, match=f"cannot push to {repo_id}: {words}"):
            timm_csg.push_to_hub(model, repo_id, token=token)
    assert repo.messages == ["initial commit"]
    assert list(regular_hub.repos) == ["user/tiny"]


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_private_repository_is_not_there_for_others(regular_hub, pushed, monkeypatch, token):
    pushed(regular_hub, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no such repository, or it is private.*hf auth login") as caught:
        timm_csg.from_pretrained("user/tiny", token=token)
    assert caught.value.status in (401, 404)


def test_wrong_token_on_loading_is_named(regular_hub, pushed):
    pushed(regular_hub)
    with pytest.raises(HubError, match="does not accept the token"):
        timm_csg.from_pretrained("user/tiny", token="hf_wrong")


def test_gated_repository_says_where_to_ask(regular_hub, pushed):
    pushed(regular_hub)
    regular_hub.fail("HEAD", "config.json", lambda handler: handler.error(403, "GatedRepo", "ask") or False)
    with pytest.raises(HubError, match="access to this repository must be granted"):
        timm_csg.from_pretrained("user/tiny")


# What is not there


def test_missing_repository_is_named(regular_hub):
    with pytest.raises(HubError, match="cannot load hf-hub:user/nothing: there is no such repository"):
        timm_csg.from_pretrained("user/nothing")


def test_missing_revision_is_named(regular_hub, model, pushed):
    repo = pushed(regular_hub)
    with pytest.raises(HubError, match="hf-hub:user/tiny@gone: the repository has no such revision"):
        timm_csg.from_pretrained("user/tiny", revision="gone")
    with pytest.raises(HubError, match=r"no such revision.*create_branch"):
        timm_csg.push_to_hub(model, "user/tiny", revision="gone")
    assert repo.messages == ["initial commit"]


@pytest.mark.parametrize("name", ["model.safetensors", "mechanism/timm_csg.safetensors"])
def test_missing_file_is_named(regular_hub, pushed, name):
    del pushed(regular_hub).files()[name]
    with pytest.raises(CheckpointError, match=f"checkpoint hf-hub:user/tiny is incomplete: {name} is missing"):
        timm_csg.from_pretrained("user/tiny")


def test_repository_without_config_is_named(regular_hub):
    regular_hub.add_repo("user/text", {"README.md": b"text"})
    with pytest.raises(CheckpointError, match=r"holds no model of timm or timm_csg: it has no config.json"):
        timm_csg.from_pretrained("user/text")


def test_repository_of_plain_timm_is_offered_to_timm(regular_hub, make_model, tmp_path):
    timm_csg.checkpoint.save_plain(make_model(), tmp_path / "plain")
    regular_hub.add_repo("user/plain", {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()})
    with pytest.raises(
        CheckpointError, match=r"timm.create_model\('hf-hub:user/plain', pretrained=True\) and call diff"
    ):
        timm_csg.from_pretrained("user/plain")
    assert not any("safetensors" in line for line in regular_hub.requests())


def test_newer_format_is_refused_before_the_weights_are_fetched(regular_hub, pushed):
    files = pushed(regular_hub).files()
    config = json.loads(files["config.json"])
    config["timm_csg"] |= {"format": 2, "versions": {"timm_csg": "0.7.1"}}
    files["config.json"] = json.dumps(config).encode()
    with pytest.raises(CheckpointError, match=r"format 2, .* up to 1; pip install --upgrade 'timm_csg>=0\.7\.1'"):
        timm_csg.from_pretrained("user/tiny")
    assert not any("safetensors" in line for line in regular_hub.requests())


def test_name_of_nothing_says_how_names_look():
    with pytest.raises(CheckpointError, match="the folder does not exist, and repositories are named 'user/name'"):
        timm_csg.from_pretrained("nothing-of-this-name")
    with pytest.raises(CheckpointError, match="resnet18 is a model of timm, which no mechanism was trained with"):
        timm_csg.from_pretrained("resnet18")


# Broken lines


@pytest.mark.parametrize(
    ("name", "share"), [("config.json", 0.5), ("model.safetensors", 0), ("model.safetensors", 0.9)]
)
def test_download_goes_on_after_a_lost_connection(regular_hub, model, pushed, images, targets, name, share):
    pushed(regular_hub)
    regular_hub.fail("GET", name, server.cut(share), times=2)
    assert same(timm_csg.from_pretrained("user/tiny"), model, images, targets)
    assert (
        sum(f"GET /user/tiny/resolve/main/{name}" in line or f"SHA/{name}" in line for line in regular_hub.requests())
        > 2
    )


def test_connection_lost_for_good_is_named_and_leaves_nothing_half_written(
    regular_hub, model, pushed, images, targets, tmp_path
):
    pushed(regular_hub)
    regular_hub.fail("GET", "model.safetensors", server.cut(0), times=99)
    with pytest.raises(HubError, match=r"the connection to the Hub failed.*check the network"):
        timm_csg.from_pretrained("user/tiny")
    assert sorted(path.name for path in leftovers(tmp_path)) == ["config.json", "timm_csg.safetensors"]
    with pytest.raises(HubError, match="it is not in the cache"):
        timm_csg.from_pretrained("user/tiny", local_files_only=True)
    regular_hub.faults.clear()
    assert same(timm_csg.from_pretrained("user/tiny"), model, images, targets)


def test_slow_server_is_waited_for(regular_hub, model, pushed, images, targets, monkeypatch):
    pushed(regular_hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    regular_hub.fail("GET", "model.safetensors", lambda handler: threading.Event().wait(0.8) and None)
    assert same(timm_csg.from_pretrained("user/tiny"), model, images, targets)


def test_hub_in_trouble_is_named(regular_hub, pushed):
    pushed(regular_hub)
    regular_hub.fail("HEAD", "config.json", server.status(503), times=99)
    with pytest.raises(HubError, match=r"the Hub has trouble \(status 503\); try again later"):
        timm_csg.from_pretrained("user/tiny")


def test_cached_model_loads_while_the_hub_is_down(regular_hub, model, pushed, images, targets):
    pushed(regular_hub)
    timm_csg.from_pretrained("user/tiny")
    regular_hub.fail("HEAD", "", server.status(503), times=99)
    assert same(timm_csg.from_pretrained("user/tiny"), model, images, targets)


def test_unreachable_hub_is_named(regular_hub):
    regular_hub.close()
    with pytest.raises(HubError, match=r"not in the cache, and the Hub cannot be reached|connection to the Hub failed"):
        timm_csg.from_pretrained("user/tiny")


def test_offline_without_the_model_in_the_cache_says_to_connect_once(regular_hub):
    with pytest.raises(HubError, match=r"not in the cache.*\(offline\); connect once"):
        timm_csg.from_pretrained("user/tiny", local_files_only=True)
    with pytest.raises(HubError, match="'hf download user/tiny --local-dir FOLDER' on a machine that has one"):
        timm_csg.from_pretrained("user/tiny", local_files_only=True)
    assert regular_hub.requests() == []


@pytest.mark.parametrize(
    ("name", "position"),
    [("config.json", 0), ("config.json", 0.3), ("model.safetensors", 0.5), ("mechanism/timm_csg.safetensors", 0.99)],
)
def test_corrupted_download_is_fetched_again(regular_hub, model, pushed, images, targets, name, position, caplog):
    pushed(regular_hub)
    regular_hub.fail("GET", name, server.flip(position))
    assert same(timm_csg.from_pretrained("user/tiny"), model, images, targets)
    assert f"downloading {name} again, the cached copy is damaged" in caplog.text


def test_damaged_repository_is_named_after_the_second_download(regular_hub, pushed):
    pushed(regular_hub)
    regular_hub.fail("GET", "model.safetensors", server.flip(), times=99)
    with pytest.raises(CheckpointError, match=r"itself is damaged, also after downloading it again.*checksum differs"):
        timm_csg.from_pretrained("user/tiny")


def test_full_disk_while_downloading_is_named(regular_hub, model, pushed, images, targets, tmp_path, monkeypatch):
    pushed(regular_hub)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", full_disk(pathlib.Path.open))
        with pytest.raises(HubError, match=r"the disk is full.*No space left.*cache_dir"):
            timm_csg.from_pretrained("user/tiny")
    assert leftovers(tmp_path) == []
    assert same(timm_csg.from_pretrained("user/tiny"), model, images, targets)


def full_disk(plain_open):
    """Files under construction open, but nothing fits into them."""

    def write(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def opened(self, *args, **kwargs):
        handle = plain_open(self, *args, **kwargs)
        if "incomplete" in self.name or self.name.endswith(".tmp"):
            raw, handle = handle, io.BufferedRandom(io.FileIO(self, "r+b"))
            raw.close()
            handle.write = write
        return handle

    return opened


def test_full_disk_while_pushing_is_named(regular_hub, model, monkeypatch):
    monkeypatch.setattr(
        pathlib.Path,
        "write_text",
        lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
    )
    with pytest.raises(HubError, match=r"cannot push to user/tiny: the disk is full.*TMPDIR"):
        timm_csg.push_to_hub(model, "user/tiny")
    assert regular_hub.requests() == []


def test_push_in_offline_mode_is_named(regular_hub, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot push to user/tiny: .*offline mode is enabled"):
        timm_csg.push_to_hub(model, "user/tiny")
    assert regular_hub.requests() == []


# Broken pushes


@pytest.mark.parametrize(
    ("method", "where", "action"),
    [
        ("POST", "commit", server.drop_in_the_body),
        ("POST", "commit", server.lose_answer),
        ("POST", "commit", server.status(503)),
        ("POST", "preupload", server.drop),
        ("POST", "validate-yaml", server.drop),
        ("GET", "/api/models/user/tiny", server.drop),
        ("PUT", "objects", server.drop_in_the_body),
        ("PUT", "objects", server.lose_answer),
        ("PUT", "objects", server.status(500)),
        ("POST", "verify", server.status(500)),
    ],
)
def test_push_ends_well_after_a_lost_connection(lfs_hub, model, other, images, targets, method, where, action):
    timm_csg.push_to_hub(other, "user/tiny")
    lfs_hub.fail(method, where, action)
    timm_csg.push_to_hub(model, "user/tiny")
    assert lfs_hub.faults[0].times == 0
    assert len(lfs_hub.repos["user/tiny"].messages) == 3
    assert same(timm_csg.from_pretrained("user/tiny"), model, images, targets)


@pytest.mark.parametrize("where", ["commit", "objects"])
def test_push_that_fails_for_good_leaves_the_old_model_whole(lfs_hub, model, other, images, targets, where):
    timm_csg.push_to_hub(other, "user/tiny")
    lfs_hub.fail("P", where, server.drop_in_the_body, times=999)
    lfs_hub.faults[0].method = "PUT" if where == "objects" else "POST"
    with pytest.raises(HubError, match="cannot push to user/tiny: the connection to the Hub failed"):
        timm_csg.push_to_hub(model, "user/tiny")
    assert len(lfs_hub.repos["user/tiny"].messages) == 2
    assert same(timm_csg.from_pretrained("user/tiny"), other, images, targets)


def test_lost_answer_to_a_pull_request_does_not_open_a_second_one(regular_hub, model):
    regular_hub.add_repo("user/tiny")
    regular_hub.fail("POST", "commit", server.lose_answer)
    with pytest.raises(HubError, match="connection to the Hub failed"):
        timm_csg.push_to_hub(model, "user/tiny", create_pr=True)
    assert list(regular_hub.repos["user/tiny"].branches) == ["main", "refs/pr/1"]


def test_two_pushes_at_once_end_with_one_whole_model(lfs_hub, model, other, gated, images, targets):
    """The weights of the second need no upload when it looks, and are no longer there when it commits."""
    timm_csg.push_to_hub(model, "user/tiny")
    regated = gated(copy.deepcopy(model), seed=5)
    seen = []

    def push_between(handler):
        if not seen:
            seen.append(True)
            timm_csg.push_to_hub(other, "user/tiny", metrics={"accuracy": 0.5})

    lfs_hub.fail("POST", "commit", push_between)
    timm_csg.push_to_hub(regated, "user/tiny", commit_message="mine")
    repo = lfs_hub.repos["user/tiny"]
    assert (len(repo.messages), repo.messages[-1]) == (4, "mine")
    assert same(timm_csg.from_pretrained("user/tiny"), regated, images, targets)
    assert "metrics.json" not in repo.files()


def test_many_pushes_at_once_each_leave_a_whole_model(regular_hub, model, other, images, targets):
    regular_hub.add_repo("user/tiny")
    errors = []

    def push(what):
        try:
            timm_csg.push_to_hub(what, "user/tiny")
        except HubError as error:
            errors.append(error)

    copies = [copy.deepcopy(what) for what in (model, other) * 2]  # saving borrows the plain view of a model
    threads = [threading.Thread(target=push, args=(what,)) for what in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("somebody else pushed at the same time" in str(error) for error in errors)
    assert len(errors) < 4
    for commit in [oid for oid, files in regular_hub.repos["user/tiny"].commits.items() if len(files) > 1]:
        loaded = timm_csg.from_pretrained("user/tiny", revision=commit)
        assert same(loaded, model, images, targets) or same(loaded, other, images, targets)


def test_push_while_loading_never_mixes_two_models(regular_hub, model, other, images, targets):
    timm_csg.push_to_hub(model, "user/tiny")

    def push_between(handler):
        if not regular_hub.faults[0].times:
            timm_csg.push_to_hub(other, "user/tiny")

    regular_hub.fail("GET", "config.json", push_between)
    assert same(timm_csg.from_pretrained("user/tiny"), model, images, targets)
    assert same(timm_csg.from_pretrained("user/tiny"), other, images, targets)


def test_metadata_that_the_hub_refuses_is_named_before_any_upload(lfs_hub, model):
    readme = b"---\ntags: [1, 2]\nbase_model: not a hub id\n---\nmine\n"
    repo = lfs_hub.add_repo("user/tiny", {"README.md": readme})
    with pytest.raises(HubError, match=r"does not accept the metadata of README.md, nothing was uploaded"):
        timm_csg.push_to_hub(model, "user/tiny")
    assert repo.files()["README.md"] == readme
    assert lfs_hub.objects == {}


@pytest.mark.parametrize("readme", [b"---\n[\n---\n", b"---\n- a\n- b\n---\n", b"---\nmodel-index: 3\n---\n"])
def test_metadata_that_cannot_be_read_is_named_and_kept(regular_hub, model, readme):
    repo = regular_hub.add_repo("user/tiny", {"README.md": readme})
    with pytest.raises(ValueError, match=r"metadata at the top of README.md .* cannot be read"):
        timm_csg.push_to_hub(model, "user/tiny")
    assert repo.files()["README.md"] == readme


def test_readme_that_is_not_text_is_named_and_kept(regular_hub, model):
    repo = regular_hub.add_repo("user/tiny", {"README.md": b"\xff\xfe"})
    with pytest.raises(HubError, match=r"README.md is not UTF-8"):
        timm_csg.push_to_hub(model, "user/tiny")
    assert repo.files()["README.md"] == b"\xff\xfe"
