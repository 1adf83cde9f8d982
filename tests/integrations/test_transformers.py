"""The Trainer mixin against the real package; that its trainings are those of the plain loop is in test_hosts.py."""

import datetime
import itertools

import pytest
import torch
import torch.nn.functional as F

import timm_csg
from timm_csg import Alternating, Joint

transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
pytest.importorskip("accelerate", reason="needs the extra 'transformers'")

from timm_csg.integrations.transformers import TransformersTrainingMixin  # noqa: E402


class DifferentiationTrainer(TransformersTrainingMixin, transformers.Trainer):
    schedule, gate_lr = Joint(), 0.3


@pytest.fixture
def make_wrapper(make_model):
    def make(seed=0, *, differentiated=True):
        config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=5)
        wrapper = transformers.TimmWrapperForImageClassification(config)
        wrapper.timm_model.load_state_dict(make_model(seed=seed).state_dict())
        if differentiated:
            timm_csg.differentiate(wrapper.timm_model, sparsity_weight=0.02, mechanism="csg")
        return wrapper

    return make


@pytest.fixture
def dataset(images, targets):
    return [{"pixel_values": image, "labels": target} for image, target in zip(images, targets, strict=True)] * 2


@pytest.fixture
def make_trainer(make_wrapper, dataset, tmp_path):
    def make(kind=DifferentiationTrainer, wrapper=None, optimizers=(None, None), **options):
        defaults = {
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "optim": "sgd",
            "per_device_train_batch_size": 3, "num_train_epochs": 2, "learning_rate": 0.05, "save_strategy": "no",
        }  # fmt: skip
        arguments = transformers.TrainingArguments(str(tmp_path), **{**defaults, **options})
        datasets = {"train_dataset": dataset, "eval_dataset": dataset}
        return kind(wrapper or make_wrapper(), arguments, optimizers=optimizers, **datasets)

    return make


def test_evaluation_and_prediction_take_the_standard_path(make_trainer, images, targets):
    trainer = make_trainer()
    trainer.train()
    predicted = trainer.predict(trainer.eval_dataset)
    expected = trainer.model.timm_model.eval()(images)
    torch.testing.assert_close(torch.as_tensor(predicted.predictions[:3]), expected.detach())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(F.cross_entropy(expected, targets).item(), rel=1e-5)


def test_gate_gets_its_own_rate_and_no_weight_decay(make_trainer):
    trainer = make_trainer(weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    gate = trainer.model.timm_model.mechanism.gate
    (group,) = [group for group in optimizer.param_groups if any(one is gate for one in group["params"])]
    assert (len(group["params"]), group["lr"], group["weight_decay"]) == (1, 0.3, 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(trainer.model.parameters()))


def test_optimizer_of_the_user_is_attached_and_otherwise_left_alone(make_trainer, make_wrapper):
    wrapper = make_wrapper()
    optimizer = torch.optim.SGD(timm_csg.param_groups(wrapper.timm_model, lr=0.05), lr=0.05)
    groups = [len(group["params"]) for group in optimizer.param_groups]
    trainer = make_trainer(wrapper=wrapper, optimizers=(optimizer, None))
    trainer.train()
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    assert trainer.progress.step == 4
    assert wrapper.timm_model.mechanism.gate.amax(dim=0).eq(1).all()


def test_training_twice_starts_counting_anew_and_projects_once(make_trainer):
    trainer = make_trainer()
    for _ in range(2):
        trainer.train()
        assert trainer.progress == timm_csg.Progress(epoch=1, step=4)


def test_bfloat16_training_keeps_the_gate_in_float32_and_feasible(make_trainer):
    trainer = make_trainer(bf16=True)
    trainer.train()
    gate = trainer.model.timm_model.mechanism.gate
    assert gate.dtype == torch.float32
    assert gate.amax(dim=0).eq(1).all()
    assert gate.min() < 1


def test_label_smoothing_of_the_arguments_is_used(make_trainer, images, targets):
    trainer = make_trainer(label_smoothing_factor=0.2)
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(
        trainer.model, {"pixel_values": images, "labels": targets}, return_outputs=True
    )
    torch.testing.assert_close(loss, F.cross_entropy(outputs["logits"], targets, label_smoothing=0.2))


def test_model_that_is_not_differentiated_is_refused_with_the_remedy(make_trainer, make_wrapper):
    with pytest.raises(TypeError, match=r"ForImageClassification with ResNet; call timm_csg\.differentiate\("):
        make_trainer(wrapper=make_wrapper(differentiated=False)).train()
    with pytest.raises(TypeError, match="found Linear;"):
        make_trainer().compute_loss(torch.nn.Linear(1, 1), {"pixel_values": 0, "labels": 0})


def test_inputs_without_labels_are_an_error(make_trainer, images):
    with pytest.raises(ValueError, match="'labels', but found \\['pixel_values'\\]"):
        make_trainer().compute_loss(None, {"pixel_values": images})


def test_weights_only_checkpoint_of_a_plain_trainer_can_be_gone_on_from(make_trainer, make_wrapper, tmp_path):
    plain = make_trainer(transformers.Trainer, make_wrapper(), save_strategy="epoch", save_only_model=True)
    plain.train()
    trainer = make_trainer(num_train_epochs=3, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.progress.epoch == 2
    assert trainer.model.timm_model.mechanism.gate.amax(dim=0).eq(1).all()


def test_trainers_that_restore_their_callbacks_resume_too(make_trainer, tmp_path):
    make_trainer(save_strategy="epoch").train()
    trainer = make_trainer(save_strategy="epoch", restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.progress == timm_csg.Progress(epoch=1, step=4)


def test_resuming_with_another_schedule_is_refused(make_trainer, tmp_path):
    make_trainer(save_strategy="epoch").train()
    trainer = make_trainer()
    trainer.schedule = Alternating()
    with pytest.raises(ValueError, match="belongs to the schedule"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_stream_without_an_end_is_read_as_long_as_training_is(make_trainer, make_wrapper, images):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return ({"pixel_values": images[index % 3], "labels": index % 5} for index in itertools.count())

    wrapper = make_wrapper(differentiated=False)
    timm_csg.differentiate(wrapper.timm_model, mechanism="assigned")
    trainer = make_trainer(wrapper=wrapper, max_steps=2)
    trainer.train_dataset = Stream()
    trainer.train()
    assert wrapper.timm_model.mechanism.assigned_from_data
    assert trainer.progress.step == 2


def test_trained_model_is_shared_with_timm_and_with_transformers(make_trainer, images, tmp_path):
    trainer = make_trainer()
    trainer.train()
    model = trainer.model.timm_model.eval()
    timm_csg.save_pretrained(model, tmp_path / "out")
    wrapper = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(wrapper(images).logits, model(images), rtol=0, atol=0)


def test_call_goes_through_what_the_trainer_wraps_around_the_model(make_trainer, images, targets, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    timeout = datetime.timedelta(seconds=30)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timeout)
    try:
        trainer = make_trainer()
        wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
        seen = []
        wrapped.register_forward_hook(lambda *_: seen.append(1))
        trainer.compute_loss(wrapped, {"pixel_values": images, "labels": targets}).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [1]
    assert trainer.model.timm_model.mechanism.gate.grad.abs().sum() > 0
