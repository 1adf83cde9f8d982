"""Pushing and pulling through a real HTTP server with the real client: requests, commits, what comes back."""

import json
import logging

import pytest
import timm
import torch
from huggingface_hub import constants

import timm_csg

BOTH = ("standard", "gated")
CREATE, INFO = "POST /api/repos/create", "GET /api/models/user/tiny"
README = ["HEAD /user/tiny/resolve/SHA/README.md", "GET /user/tiny/resolve/SHA/README.md"]
CHECKS = ["POST /api/validate-yaml", "POST /api/models/user/tiny/preupload/main"]
COMMIT = "POST /api/models/user/tiny/commit/main"
BATCH = "POST /user/tiny.git/info/lfs/objects/batch"
OBJECT = ["PUT /objects/OID", "POST /verify/OID"]
CONFIG = ["HEAD /user/tiny/resolve/main/config.json", "GET /user/tiny/resolve/main/config.json"]
TENSORS = [
    f"{method} /user/tiny/resolve/SHA/{name}"
    for name in ("mechanism/timm_csg.safetensors", "model.safetensors")
    for method in ("HEAD", "GET")
]


def assert_bit_equal(found, expected, images, targets):
    found, expected = found(images, targets, paths=BOTH), expected(images, targets, paths=BOTH)
    assert torch.equal(found.standard, expected.standard)
    assert torch.equal(found.gated, expected.gated)


def test_requests_of_push_pull_second_push_and_offline_pull(hub, model, images, targets, monkeypatch):
    commit = timm_csg.push_to_hub(model, "user/tiny")
    batch = [BATCH] * hub.lfs
    log = hub.requests()
    objects = sorted(OBJECT * 2 * hub.lfs)
    assert sorted(line for line in log if "OID" in line) == objects
    assert [line for line in log if "OID" not in line] == [CREATE, INFO, *CHECKS, *batch, COMMIT]

    assert_bit_equal(timm_csg.from_pretrained("user/tiny"), model, images, targets)
    assert hub.requests() == [*CONFIG, *TENSORS]

    again = timm_csg.push_to_hub(model, "user/tiny")
    assert hub.requests() == [CREATE, INFO, *README, *CHECKS, *batch, "GET /api/models/user/tiny/revision/main"]
    assert again.oid == commit.oid
    assert hub.repos["user/tiny"].messages == ["initial commit", "Add test_resnet with mechanism csg"]

    timm_csg.from_pretrained("user/tiny")
    assert hub.requests() == CONFIG[:1]
    assert_bit_equal(timm_csg.from_pretrained("user/tiny", local_files_only=True), model, images, targets)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_bit_equal(timm_csg.from_pretrained("user/tiny"), model, images, targets)
    assert hub.requests() == []


def test_all_files_arrive_in_one_commit(hub, model, tmp_path):
    figure = tmp_path / "gate of mine.png"
    figure.write_bytes(b"\x89PNG")
    timm_csg.push_to_hub(model, "user/tiny", metrics={"accuracy": 0.5}, figures=[figure], commit_message="all of it")
    repo = hub.repos["user/tiny"]
    assert repo.messages == ["initial commit", "all of it"]
    names = ["config.json", "model.safetensors", "mechanism/timm_csg.safetensors", "metrics.json", "README.md"]
    assert sorted(repo.files()) == sorted([".gitattributes", *names, "assets/gate_of_mine.png"])
    assert "![gate_of_mine.png](assets/gate_of_mine.png)" in repo.files()["README.md"].decode()


def test_new_weights_and_gate_replace_the_old_ones_together(regular_hub, model, other, images, targets):
    timm_csg.push_to_hub(model, "user/tiny", metrics={"accuracy": 0.5})
    timm_csg.push_to_hub(other, "user/tiny")
    assert_bit_equal(timm_csg.from_pretrained("user/tiny"), other, images, targets)
    assert "metrics.json" not in regular_hub.repos["user/tiny"].files()
    assert len(regular_hub.repos["user/tiny"].messages) == 3


def test_model_that_was_pulled_is_unchanged_when_pushed_again(regular_hub, model):
    first = timm_csg.push_to_hub(model, "user/tiny")
    assert timm_csg.push_to_hub(timm_csg.from_pretrained("user/tiny"), "user/tiny").oid == first.oid


def test_old_revision_stays_available(regular_hub, model, other, images, targets):
    first = timm_csg.push_to_hub(model, "user/tiny").oid
    timm_csg.push_to_hub(other, "user/tiny")
    assert_bit_equal(timm_csg.from_pretrained("user/tiny", revision=first), model, images, targets)
    assert_bit_equal(timm_csg.from_pretrained(f"hf-hub:user/tiny@{first}"), model, images, targets)
    assert_bit_equal(timm_csg.from_pretrained("hf-hub:user/tiny"), other, images, targets)


def test_push_to_a_branch_leaves_main_alone(regular_hub, model, images, targets):
    repo = regular_hub.add_repo("user/tiny")
    repo.branches["next"] = repo.branches["main"]
    timm_csg.push_to_hub(model, "user/tiny", revision="next")
    assert list(repo.files("main")) == [".gitattributes"]
    assert_bit_equal(timm_csg.from_pretrained("user/tiny", revision="next"), model, images, targets)


def test_pull_request_leaves_main_alone(regular_hub, model):
    repo = regular_hub.add_repo("user/tiny")
    commit = timm_csg.push_to_hub(model, "user/tiny", create_pr=True)
    assert commit.pr_url.endswith("/user/tiny/discussions/1")
    assert list(repo.files("main")) == [".gitattributes"]
    assert "model.safetensors" in repo.files("refs/pr/1")


def test_private_repository_is_made_and_read_with_the_token(regular_hub, model):
    timm_csg.push_to_hub(model, "user/tiny", private=True)
    assert regular_hub.repos["user/tiny"].private
    timm_csg.from_pretrained("user/tiny", token="hf_dummy")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout", "test_vit"])
def test_plain_timm_loads_the_repository_with_bit_equal_logits(regular_hub, make_model, gated, images, name):
    model = gated(timm_csg.differentiate(make_model(name), mechanism="csg"))
    timm_csg.push_to_hub(model, "user/tiny")
    plain = timm.create_model("hf-hub:user/tiny", pretrained=True).eval()
    assert not timm_csg.is_differentiated(plain)
    assert torch.equal(plain(images), model(images))


def test_plain_timm_caches_what_we_downloaded(regular_hub, model):
    timm_csg.push_to_hub(model, "user/tiny")
    timm_csg.from_pretrained("user/tiny")
    regular_hub.requests()
    timm.create_model("hf-hub:user/tiny", pretrained=True)
    assert not any(line.startswith("GET") for line in regular_hub.requests())


def test_transformers_loads_the_repository(regular_hub, model, images, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    timm_csg.push_to_hub(model, "user/tiny")
    wrapper = transformers.TimmWrapperForImageClassification.from_pretrained("user/tiny").eval()
    assert torch.equal(wrapper(images).logits, model(images))


def test_base_model_and_its_revision_are_recorded(regular_hub, model):
    timm_csg.push_to_hub(model, "user/tiny", base_model="timm/resnet18.a1_in1k", base_revision="abc")
    files = regular_hub.repos["user/tiny"].files()
    own = json.loads(files["config.json"])["timm_csg"]
    assert (own["base_model"], own["base_revision"]) == ("timm/resnet18.a1_in1k", "abc")
    assert "\nbase_model: timm/resnet18.a1_in1k\n" in files["README.md"].decode()


def test_commit_is_in_the_log(regular_hub, pushed, caplog):
    repo = pushed(regular_hub)
    with caplog.at_level(logging.INFO, logger="timm_csg"):
        timm_csg.from_pretrained("user/tiny")
    assert f"loaded hf-hub:user/tiny at commit {repo.branches['main']}" in caplog.text


def test_downloads_go_where_they_are_told(regular_hub, pushed, tmp_path):
    pushed(regular_hub)
    timm_csg.from_pretrained("user/tiny", cache_dir=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "models--user--tiny").is_dir()
    assert not (tmp_path / "cache").exists()


def test_force_download_downloads_again(regular_hub, pushed):
    pushed(regular_hub)
    timm_csg.from_pretrained("user/tiny")
    regular_hub.requests()
    timm_csg.from_pretrained("user/tiny", force_download=True)
    assert regular_hub.requests() == [*CONFIG, *TENSORS]


def test_folder_goes_before_a_repository_of_that_name(
    regular_hub, model, other, images, targets, tmp_path, monkeypatch
):
    timm_csg.push_to_hub(model, "user/tiny")
    regular_hub.requests()
    monkeypatch.chdir(tmp_path)
    timm_csg.save_pretrained(other, "user/tiny")
    assert_bit_equal(timm_csg.from_pretrained("user/tiny"), other, images, targets)
    assert regular_hub.requests() == []
    assert_bit_equal(timm_csg.from_pretrained("hf-hub:user/tiny"), model, images, targets)


def test_folder_with_revision_is_refused(saved):
    with pytest.raises(ValueError, match="is a folder and has no revision"):
        timm_csg.from_pretrained(saved, revision="main")


def test_two_different_revisions_are_refused():
    with pytest.raises(ValueError, match="names the revision 'a', but revision='b'"):
        timm_csg.from_pretrained("hf-hub:user/tiny@a", revision="b")


def test_plain_model_is_refused_before_any_request(regular_hub, make_model):
    with pytest.raises(TypeError, match="expected a differentiated model"):
        timm_csg.push_to_hub(make_model(), "user/tiny")
    assert regular_hub.requests() == []


@pytest.mark.parametrize(
    "repo_id", ["tiny", "user/tiny/more", "../tiny", "user/a b", "user/..", "", None, "user/x.git"]
)
def test_wrong_repository_name_is_refused_before_any_request(regular_hub, model, repo_id):
    with pytest.raises(ValueError, match="repo_id must be 'user/name'"):
        timm_csg.push_to_hub(model, repo_id)
    assert regular_hub.requests() == []


def test_pull_request_to_a_branch_is_refused(regular_hub, model):
    with pytest.raises(ValueError, match="a pull request goes to main"):
        timm_csg.push_to_hub(model, "user/tiny", create_pr=True, revision="next")


def test_metrics_that_are_not_json_are_refused_before_any_request(regular_hub, model):
    with pytest.raises(ValueError, match="values that JSON can hold"):
        timm_csg.push_to_hub(model, "user/tiny", metrics={"loss": float("nan")})
    assert regular_hub.requests() == []


def test_figure_that_is_no_png_is_refused(regular_hub, model, tmp_path):
    with pytest.raises(ValueError, match=r"must be \.png files"):
        timm_csg.push_to_hub(model, "user/tiny", figures=[tmp_path / "gate.jpg"])
