"""The model card: true, valid, runnable, and careful with what its author wrote."""

import json
import re

import pytest
import yaml
from hub.server import card_errors

import timm_csg
from timm_csg import card

METRICS = {
    "accuracy": 0.9175,
    "gated_accuracy": 0.9968,
    "gated_accuracy_uses_labels": True,
    "gate_density": 0.12,
    "data": "CIFAR-10 | test",
    "seed": 7,
    "recipe": "paper",
    "filters_per_class": [6, 7],
}


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def facts(**options):
    return card.Facts("tiny", "hf-hub:user/tiny", **options)


def test_metadata_is_what_the_hub_expects(model):
    text = card.model_card(model, facts(metrics=METRICS, base_model="timm/resnet18.a1_in1k"))
    assert card_errors(text) == []
    data = front_matter(text)
    assert (data["library_name"], data["pipeline_tag"]) == ("timm", "image-classification")
    assert data["tags"] == ["image-classification", "timm", "timm-csg", "csg", "interpretability"]
    assert data["base_model"] == "timm/resnet18.a1_in1k"
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"name": "CIFAR-10 test", "type": "CIFAR-10-test"}
    assert result["metrics"] == [{"type": "accuracy", "value": 0.9175, "name": "accuracy, standard path (timm_csg)"}]


@pytest.mark.parametrize("base_model", ["/home/me/model", "resnet18", "runs/a b", "../x/y", None])
def test_base_model_that_is_no_hub_id_stays_out_of_the_metadata(model, base_model):
    text = card.model_card(model, facts(base_model=base_model))
    assert "base_model" not in front_matter(text)
    assert card_errors(text) == []


def test_numbers_data_and_seed_are_in_the_table(model):
    text = card.model_card(model, facts(metrics=METRICS))
    assert "Data: CIFAR-10 test. Seed: 7." in text
    assert "| accuracy, standard path | 0.9175 |" in text
    assert "| accuracy, gated path (the gate is given the true label) | 0.9968 |" in text
    assert "Recipe `paper`." in text


def test_nothing_measured_is_said(model):
    assert "Nothing was measured for this card." in card.model_card(model, facts())


def test_limits_of_label_gating_are_told(model, make_model):
    assert "labels leak through the gate" in card.model_card(model, facts())
    text = card.model_card(timm_csg.differentiate(make_model(), mechanism="assigned"), facts())
    assert "assigned filters: every filter" in text
    assert "Citation" not in text
    assert "leak" not in text
    assert "gated = model(images, paths=" in text


def test_mechanism_that_acts_at_inference_says_what_plain_timm_lacks(model, monkeypatch):
    monkeypatch.setattr(type(model.mechanism), "acts_without_targets", True)
    assert "without the mechanism, which acts at inference too" in card.model_card(model, facts())


def test_layer_options_figures_citation_and_versions_are_named(model):
    text = card.model_card(model, facts(figures=["assets/gate.png"]))
    for words in ("layer4: 96 filters", "| `initial_gate` | 0.5 | 0.5 |", "](assets/gate.png)", "liang2020training"):
        assert words in text
    assert f"timm_csg {timm_csg.__version__}" in text


def test_same_input_gives_the_same_text(model):
    first = card.model_card(model, facts(metrics=METRICS))
    assert card.model_card(model, facts(metrics=METRICS)) == first
    assert card.model_card(model, facts(metrics=METRICS), first) == first


def test_saved_card_is_headed_by_the_architecture_and_not_by_the_folder(model, tmp_path):
    timm_csg.save_pretrained(model, tmp_path / "model", metrics=METRICS)
    text = (tmp_path / "model" / "README.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# test_resnet"]
    assert front_matter(text)["model-index"][0]["name"] == "test_resnet"
    assert 'create_model("local-dir:model"' in text


def test_code_of_a_saved_card_runs(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(), re.DOTALL):
        exec(code, namespace)
    assert namespace["gated"].shape == (1, 5)
    assert namespace["owners"].shape == (96,)


def test_code_of_a_pushed_card_runs(regular_hub, make_model):
    timm_csg.push_to_hub(timm_csg.differentiate(make_model(), mechanism="assigned"), "user/tiny")
    namespace = {}
    readme = regular_hub.repos["user/tiny"].files()["README.md"].decode()
    for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(code, namespace)
    assert namespace["gated"].shape == (1, 5)


def test_text_and_metadata_of_the_author_survive_a_later_push(regular_hub, model, other):
    timm_csg.push_to_hub(model, "user/tiny", metrics=METRICS)
    files = regular_hub.repos["user/tiny"].files()
    mine = files["README.md"].decode().replace("# tiny\n", "# My model\n\nMy own words — with ünïcode.\n")
    mine = mine.replace("tags:\n", "license: mit\nlanguage: de\nmy_key: {a: 1}\ntags:\n- birds\n")
    mine = mine.replace("model-index:\n- name: tiny\n", "model-index:\n- name: my name\n") + "\n## More of mine\n"
    files["README.md"] = mine.encode()
    timm_csg.push_to_hub(other, "user/tiny", metrics=METRICS | {"accuracy": 0.25})
    text = regular_hub.repos["user/tiny"].files()["README.md"].decode()
    for words in ("# My model\n\nMy own words — with ünïcode.", "## More of mine", "| 0.2500 |"):
        assert words in text
    assert "0.9175" not in text
    data = front_matter(text)
    assert (data["license"], data["language"], data["my_key"]) == ("mit", "de", {"a": 1})
    assert data["tags"][0] == "birds"
    assert data["model-index"][0]["name"] == "my name"
    assert text.count("timm_csg: begin") == 1


def test_results_of_the_author_are_kept_beside_ours(model):
    theirs = {
        "task": {"type": "image-classification"},
        "dataset": {"name": "mine", "type": "mine"},
        "metrics": [{"type": "f1", "value": 0.5, "name": "F1"}],
    }
    index = yaml.safe_dump({"model-index": [{"name": "x", "results": [theirs]}]})
    for _ in range(2):
        text = card.model_card(model, facts(metrics=METRICS), f"---\n{index}---\nmine\n")
        results = front_matter(text)["model-index"][0]["results"]
        assert sorted(result["metrics"][0]["type"] for result in results) == ["accuracy", "f1"]


@pytest.mark.parametrize(
    "before", ["mine, no metadata\n", "---\nlicense: mit\n---\nmine\n", "---\n---\nmine\n", "\ufeff# mine\n"]
)
def test_readme_without_a_block_gets_one_at_its_end(regular_hub, model, before):
    repo = regular_hub.add_repo("user/tiny", {"README.md": before.encode()})
    timm_csg.push_to_hub(model, "user/tiny")
    text = repo.files()["README.md"].decode()
    assert text.index("mine") < text.index("timm_csg: begin")
    assert card_errors(text) == []
    assert front_matter(text)["library_name"] == "timm"


def test_saving_replaces_only_our_block(saved, other):
    readme = saved / "README.md"
    readme.write_text(readme.read_text().replace("# test_resnet", "# My title") + "my end\n")
    timm_csg.save_pretrained(other, saved, metrics=METRICS)
    text = readme.read_text()
    assert "# My title" in text
    assert text.endswith("my end\n")
    assert "| 0.9175 |" in text


def test_saving_leaves_a_readme_with_damaged_metadata_alone(saved, other, caplog):
    text = "---\n[\n---\n" + (saved / "README.md").read_text()
    (saved / "README.md").write_text(text)
    timm_csg.save_pretrained(other, saved)
    assert (saved / "README.md").read_text() == text
    assert "is left as it is" in caplog.text


def test_words_of_metrics_cannot_break_the_card(model):
    nasty = "x --> <!-- timm_csg: end --> ```\n---\n| [a](javascript:b) " * 5
    text = card.model_card(model, facts(metrics={"accuracy": 0.5, "data": nasty, "seed": nasty, nasty: 3.0}))
    assert text.count(card.END) == 1
    assert card_errors(text) == []
    assert card.model_card(model, facts(metrics=METRICS), text) == card.model_card(model, facts(metrics=METRICS))


def test_figures_of_an_earlier_push_go_with_it(regular_hub, model, other, tmp_path):
    figure = tmp_path / "gate.png"
    figure.write_bytes(b"\x89PNG")
    timm_csg.push_to_hub(model, "user/tiny", figures=[figure])
    files = regular_hub.repos["user/tiny"].files()
    files["assets/mine.png"] = b"mine"
    timm_csg.push_to_hub(other, "user/tiny")
    files = regular_hub.repos["user/tiny"].files()
    assert "assets/gate.png" not in files
    assert files["assets/mine.png"] == b"mine"


def test_metrics_file_holds_what_was_given(saved, model):
    timm_csg.save_pretrained(model, saved, metrics=METRICS)
    assert json.loads((saved / "metrics.json").read_text()) == METRICS


def test_numbers_come_with_their_intervals(model):
    measured = {"accuracy": 0.5, "accuracy_interval": [0.25, 0.75], "purity": 0.6, "purity_floor": 0.4}
    text = card.model_card(model, card.Facts("tiny", "user/tiny", measured))
    assert "| accuracy, standard path | 0.5000 (95 % interval 0.2500 to 0.7500) |" in text
    assert "strongest images | 0.6000 |\n| the same with shuffled labels | 0.4000 |" in text
