"""The examples of the hosts run, learn, resume and save."""

import importlib.util
import os
from pathlib import Path

import pytest
import timm
import torch
from integrations.train_script import Pictures
from timm.data import create_loader
from timm.utils.model import unwrap_model

import timm_csg
from timm_csg.integrations.timm_task import load_task_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = Path(__file__).parent / "train_script.py"


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main([str(argument) for argument in arguments])

    return run


def timm_train(run_example, folder, *options, recipe="assigned", script=SCRIPT):
    common = [folder, "--model", "test_resnet", "--num-classes", 5, "--lr", 0.05]
    return run_example("timm_train", script, "--recipe", recipe, *common, *options)


def test_timms_script_trains_a_differentiated_model(run_example, tmp_path):
    names = timm.models.create_model, timm.optim.create_optimizer_v2
    task = timm_train(run_example, tmp_path, "--model-ema", "--layer-decay", 0.7, "--epochs", 2)
    assert task.progress == timm_csg.Progress(epoch=2, step=10)
    assert task.schedule == timm_csg.Joint()
    model = task.get_trainable_module()
    own = model.mechanism.assignment
    assert model.fc.weight[~own].eq(0).all()
    assert model.fc.weight[own].ne(0).all()
    assert names == (timm.models.create_model, timm.optim.create_optimizer_v2)  # nothing stays replaced


def test_it_assigns_filters_from_its_training_pictures_without_augmentation(run_example, tmp_path):
    task = timm_train(run_example, tmp_path, "--model-ema", "--epochs", 1)
    torch.manual_seed(42)
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5))
    options = {"batch_size": 4, "num_workers": 0, "use_prefetcher": False}
    plain = create_loader(Pictures(5), (3, 32, 32), is_training=False, crop_pct=0.8, **options)
    expected = timm_csg.assign_filters(model, plain).matrix
    for ema in (False, True):
        assert torch.equal(unwrap_model(task.get_trainable_module(ema=ema)).mechanism.assignment, expected)
    resumed = timm_train(run_example, tmp_path, "--epochs", 2, "--resume", tmp_path / "last.pth.tar", "--size", 10)
    assert torch.equal(resumed.get_trainable_module().mechanism.assignment, expected)


@pytest.mark.parametrize("ema", [False, True])
def test_its_checkpoints_load_in_plain_timm_and_become_shared_ones(run_example, tmp_path, images, ema):
    timm_train(run_example, tmp_path, "--model-ema")
    path = tmp_path / "model_best.pth.tar"
    model = load_task_checkpoint(timm.create_model("test_resnet", num_classes=5), path, ema=ema)
    timm_csg.save_pretrained(model, tmp_path / "out")
    assert torch.equal(timm_csg.from_pretrained(tmp_path / "out")(images), model(images))
    if ema:
        plain = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(path)).eval()
        assert torch.equal(plain(images), model(images))


def test_its_epochs_are_known_with_gradient_accumulation_and_after_a_resume(run_example, tmp_path):
    options = ("--grad-accum-steps", 2, "--model-ema")
    task = timm_train(run_example, tmp_path, "--epochs", 2, *options, recipe="paper")
    assert task.progress == timm_csg.Progress(epoch=2, step=6)
    untouched = task.get_trainable_module().mechanism.gate
    assert (untouched == 1).all()  # two standard epochs: projected, not trained
    task = timm_train(
        run_example, tmp_path, "--epochs", 3, *options, "--resume", tmp_path / "last.pth.tar", recipe="paper"
    )
    assert task.progress == timm_csg.Progress(epoch=3, step=9)
    assert task.get_trainable_module().mechanism.gate.min() < 1


@pytest.mark.skipif("TIMM_TRAIN_SCRIPT" not in os.environ, reason="TIMM_TRAIN_SCRIPT names no train.py of timm")
@pytest.mark.parametrize(
    "options",
    [
        ["--recipe", "paper", "--model-ema"],
        ["--mixup", "0.2", "--cutmix", "1", "--clip-grad", "1"],
        ["--amp", "--amp-dtype", "bfloat16", "--grad-accum-steps", "2"],
        ["--clip-grad", "0.02", "--clip-mode", "agc", "--layer-decay", "0.7"],
        ["--torchcompile", "aot_eager", "--channels-last"],
    ],
    ids=" ".join,
)
def test_timms_own_script_runs_unmodified(run_example, tmp_path, options):
    from PIL import Image

    for split in ("train", "validation"):
        for index in range(16):
            path = tmp_path / "data" / split / f"class{index % 4}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (index * 16, 80, 40)).save(path)
    arguments = (
        f"{tmp_path}/data --model test_resnet --num-classes 4 --img-size 64 -b 8 --epochs 3 --cooldown-epochs 0 "
        f"--warmup-epochs 0 --lr 0.05 --workers 0 --device cpu --output {tmp_path}/out --experiment run"
    )
    task = run_example("timm_train", os.environ["TIMM_TRAIN_SCRIPT"], *arguments.split(), *options)
    assert task.progress.epoch == 3
    path = tmp_path / "out/run/last.pth.tar"
    model = load_task_checkpoint(timm.create_model("test_resnet", num_classes=4), path)
    trained = task.get_trainable_module().mechanism.state_dict()
    torch.testing.assert_close(model.mechanism.state_dict(), trained, rtol=0, atol=0)
    assert trained.get("assigned_from_data", True)


@pytest.mark.slow
def test_lightning_example_learns_saves_and_resumes(run_example, tmp_path):
    pytest.importorskip("lightning", reason="needs the extra 'lightning'")
    result = run_example("lightning_loop", "--epochs", 3, "--output", tmp_path)
    assert result["accuracy"] > 0.5
    assert result["gated_accuracy"] > 0.3
    assert timm_csg.from_pretrained(tmp_path / "model").mechanism.assigned_from_data
    run_example("lightning_loop", "--epochs", 4, "--resume", tmp_path / "last.ckpt", "--output", tmp_path)


@pytest.mark.slow
def test_trainer_example_learns_saves_and_resumes(run_example, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    assert run_example("hf_trainer", "--epochs", 2, "--output", tmp_path)["eval_accuracy"] > 0.3
    assert timm_csg.from_pretrained(tmp_path / "model").mechanism.assigned_from_data
    assert run_example("hf_trainer", "--epochs", 3, "--resume", "--output", tmp_path)["epoch"] == 3


@pytest.mark.parametrize(
    ("switch", "found"),
    [
        (["--torchscript"], "cannot be trained with --torchscript; leave it out"),
        (["--kd-model-name", "resnet18"], "cannot be trained with --kd-model-name; leave it out"),
        (["--naflex-loader"], "cannot be trained with --naflex-loader; leave it out"),
        (["--gp", ""], "does not pool; make it with pooling"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_switches_that_no_gate_can_follow_end_in_one_sentence(run_example, tmp_path, switch, found):
    with pytest.raises(SystemExit, match=found):
        timm_train(run_example, tmp_path, "--model", "test_vit", *switch)
    assert not list(tmp_path.iterdir())
