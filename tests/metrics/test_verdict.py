"""verdict says yes to filters with owners, and no in every situation that only looks like it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.verdict import owner_evidence

from timm_csg import metrics
from timm_csg.metrics.verdicts import verdict


def simulate(classes=5, filters=20, samples=300, strength=2.0, seed=0, share_of_first=None):
    """Assignment, responses of filters with owners, targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=generator)
    if share_of_first is not None:
        targets[torch.rand(samples, generator=generator) < share_of_first] = 0
    owners = torch.arange(filters) % classes
    own = (targets[:, None] == owners).float()
    features = (torch.randn(samples, filters, generator=generator) + strength * own).relu()
    return torch.nn.functional.one_hot(owners, classes).T.float(), features, targets


def removal(classes, before=0.9, own=0.0, others=None):
    after = torch.full((classes, classes), before if others is None else others)
    return metrics.Ablation(torch.full((classes,), before), after.fill_diagonal_(own))


def judge(matrix, features, targets, **options):
    """With everything else as good as it can be."""
    good = {"accuracy": 0.99, "removal": removal(len(matrix)), "standard_accuracy": 0.99}
    return verdict(matrix, features, targets, **{**good, **options})


def assert_no(found, reason):
    assert not found.trusted
    assert found.sentence.startswith("The owners of the filters cannot be trusted: ")
    assert any(reason in text for text in found.reasons), found.reasons
    assert found.reasons[0] in found.sentence
    assert found.advice.endswith(".")


@pytest.mark.parametrize("classes", [2, 3, 5, 50])
@pytest.mark.parametrize("seed", range(3))
def test_owners_are_trusted_with_any_number_of_classes(classes, seed):
    found = judge(*simulate(classes, 2 * classes, 40 * classes, 4.0, seed))
    assert (found.trusted, found.reasons, found.advice) == (True, (), "")
    assert found.sentence.startswith("The owners of the filters can be trusted: 100% of the owned filters respond most")
    assert "without its filters a class has an accuracy of 0.000" in found.sentence


def test_the_sentence_says_when_a_mask_is_behind_the_removal():
    found, masked = (judge(*simulate(), masked=value).sentence for value in (False, True))
    assert masked == found.replace("0.000.", "0.000, since the classifier is masked to use no others.") != found


@pytest.mark.parametrize("seed", range(5))
def test_thirty_six_pictures_of_three_classes_are_enough(seed):
    matrix, features, targets = simulate(3, 30, 36, 4.0, seed)
    assert judge(matrix, features, targets, removal=removal(3, own=0.142)).trusted


def test_numbers_equal_a_loop():
    matrix, features, targets = simulate(4, 13, 60, 1.0)
    matrix[1, 2] = 0.7  # the third filter has two owners, the fourth none, the fifth is silent
    matrix[:, 3], features[:, 4] = 0.4, 0.0
    owned, agreement, correlation = owner_evidence(matrix, features, targets)
    found = judge(matrix, features, targets)
    assert (found.owned, found.agreement, found.correlation) == pytest.approx((owned, agreement, correlation))
    assert found.owned == pytest.approx(11 / 12)
    assert 0 < found.agreement < 1


def test_shuffled_numbers_are_those_of_shuffled_labels():
    matrix, features, targets = simulate(4, 200, 400)
    found, correlations = judge(matrix, features, targets), []
    for seed in range(20):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(100 + seed))
        correlations.append(metrics.class_correlation(features, targets[order]).amax(dim=0).mean())
    assert found.shuffled_agreement == pytest.approx(0.25, abs=0.05)
    assert found.shuffled_correlation == pytest.approx(float(torch.stack(correlations).mean()), rel=0.05)
    assert found.shuffled_deviation == pytest.approx(float(torch.stack(correlations).std()), rel=0.6)
    assert judge(matrix, features, targets) == found
    assert judge(matrix, features, targets, random_state=1) != found


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("make", [torch.ones_like, lambda gate: gate.where(gate == 1, 0.6)], ids=["ones", "dense"])
def test_a_dense_gate_is_not_trusted_whatever_else_is_good(classes, make):
    matrix, features, targets = simulate(classes)
    assert_no(judge(make(matrix), features, targets), "no filter serves one class alone")


def test_a_few_owned_filters_among_shared_ones_are_not_enough():
    matrix, features, targets = simulate(5, 20)
    matrix[:, 6:] = 1
    assert_no(judge(matrix, features, targets), "only 6 of 20 filters serve one class alone")


def test_filters_that_serve_nobody_do_not_count():
    matrix, features, targets = simulate(5, 20, strength=4.0)
    matrix[:, 10:] = 0
    assert judge(matrix, features, targets).trusted
    assert_no(judge(torch.zeros_like(matrix), features, targets), "no filter serves")


@pytest.mark.parametrize("classes", [2, 3, 5, 20])
def test_shuffled_labels_are_not_trusted(classes):
    matrix, features, targets = simulate(classes, 4 * classes)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))
    assert_no(judge(matrix, features, targets[order]), "hardly tell their owner")


@pytest.mark.parametrize("classes", [2, 3, 5, 20])
def test_a_random_assignment_is_not_trusted_although_removal_is_exact(classes):
    matrix, features, targets = simulate(classes, 4 * classes)
    order = torch.randperm(4 * classes, generator=torch.Generator().manual_seed(1))
    assert_no(judge(matrix[:, order], features, targets), "of the owned filters respond most to their owner")


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_owners_chosen_from_the_measured_noise_are_not_trusted(classes):
    _, features, targets = simulate(classes, 40, 60, strength=0.0)
    owners = metrics.class_correlation(features, targets, classes).argmax(dim=0)
    found = judge(torch.nn.functional.one_hot(owners, classes).T.float(), features, targets)
    assert found.agreement == 1
    assert_no(found, "hardly tell their owner")


@pytest.mark.parametrize("classes", [2, 3])
def test_filters_that_are_silent_for_their_class_do_not_agree(classes):
    matrix, features, targets = simulate(classes, strength=4.0)
    assert_no(judge(matrix, -features, targets), "only 0% of the owned filters respond most")


def test_filters_that_never_respond_do_not_agree():
    matrix, features, targets = simulate(strength=4.0)
    features[:, ::5] = 0  # those of the first class, which a first largest entry would take for agreement
    assert_no(judge(matrix, features, targets), "only 80% of the owned filters")


def test_a_correlation_that_is_real_but_tiny_is_not_enough():
    matrix, features, targets = simulate(2, 4, 60_000, strength=0.1)
    found = judge(matrix, features, targets)
    assert found.agreement == 1
    assert found.correlation > found.shuffled_correlation + 4 * found.shuffled_deviation
    assert_no(found, "hardly tell their owner")


def test_too_few_pictures_are_not_enough():
    matrix, features, targets = simulate(3, 6, 6, strength=1.0)
    assert_no(judge(matrix, features, targets), "hardly tell their owner")


@pytest.mark.parametrize(("share_of_first", "accuracy"), [(None, 0.52), (0.8, 0.92)])
def test_a_model_at_chance_is_not_trusted(share_of_first, accuracy):
    matrix, features, targets = simulate(2, share_of_first=share_of_first)
    assert_no(judge(matrix, features, targets, accuracy=accuracy), "naming the most frequent class")


def test_unbalanced_classes_can_be_trusted():
    matrix, features, targets = simulate(3, 12, 400, 4.0, share_of_first=0.8)
    assert judge(matrix, features, targets).trusted


@pytest.mark.parametrize(("classes", "own"), [(20, 0.11), (3, 0.18), (2, 0.27)])
def test_a_class_that_survives_without_its_filters_is_named(classes, own):
    matrix, features, targets = simulate(classes, 2 * classes, 40 * classes, 4.0)
    assert_no(judge(matrix, features, targets, removal=removal(classes, own=own)), "still recognised")
    assert judge(matrix, features, targets, removal=removal(classes, own=0.9 * own)).trusted


def test_a_weak_class_must_lose_half_of_its_accuracy():
    matrix, features, targets = simulate(strength=4.0)
    assert_no(judge(matrix, features, targets, removal=removal(5, before=0.1, own=0.09)), "still recognised")


def test_others_that_suffer_and_a_removal_that_nobody_measured_are_named():
    matrix, features, targets = simulate(strength=4.0)
    assert_no(judge(matrix, features, targets, removal=removal(5, others=0.87)), "harms the others")
    assert judge(matrix, features, targets, removal=removal(5, others=0.881)).trusted
    assert_no(judge(matrix, features, targets, removal=None), "was not measured")


def test_accuracy_lost_against_standard_training_is_named_if_it_is_more_than_a_picture():
    matrix, features, targets = simulate(3, 30, 36, 4.0)
    good = {"accuracy": 33 / 36}
    assert_no(judge(matrix, features, targets, standard_accuracy=35 / 36, **good), "standard training has 0.972")
    assert judge(matrix, features, targets, standard_accuracy=34 / 36, **good).trusted
    assert judge(matrix, features, targets, standard_accuracy=None, **good).trusted


def test_classes_without_pictures_are_not_judged_and_one_class_alone_is_named():
    matrix, features, targets = simulate(5, 20, 300, 4.0)
    seen = targets < 3
    found = judge(matrix, features[seen], targets[seen], removal=removal(5))
    assert found.trusted
    only = targets == 1
    assert_no(judge(matrix, features[only], targets[only]), "one class only")


def test_the_advice_is_that_of_the_first_reason():
    _, features, targets = simulate(30, 20)
    found = judge(torch.ones(30, 20), features, targets, removal=removal(30, own=0.5))
    assert len(found.reasons) == 2
    assert found.advice == "There are fewer filters (20) than classes (30): use a wider model or fewer classes."


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_never_yes_where_labels_do_not_depend_on_the_responses(data):
    classes, copies = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 20))
    samples, kinds = data.draw(st.integers(2, 200)), data.draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weights = torch.rand(classes, generator=generator) ** data.draw(st.sampled_from([0, 1, 4]))
    targets = torch.multinomial(weights, samples, replacement=True, generator=generator)
    features = torch.randn(samples, kinds, generator=generator) ** data.draw(st.sampled_from([1, 3]))
    features = features.relu().repeat(1, copies)  # filters that respond alike
    if data.draw(st.booleans()):
        owners = torch.randint(classes, (features.shape[1],), generator=generator)
    else:
        owners = metrics.class_correlation(features, targets, classes).argmax(dim=0)
    matrix = torch.nn.functional.one_hot(owners, classes).T.float()
    assert not judge(matrix, features, targets).trusted


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 1000))
def test_order_of_pictures_and_filters_does_not_matter(classes, each, seed):
    matrix, features, targets = simulate(classes, classes * each, 30 * classes, 3.0, seed)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    filters = torch.randperm(classes * each, generator=torch.Generator().manual_seed(seed))
    found = judge(matrix, features, targets)
    other = judge(matrix[:, filters], features[order][:, filters], targets[order])
    assert found.trusted == other.trusted
    assert found.agreement == pytest.approx(other.agreement)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(5, 19), "20 filters"),
        (torch.ones(20), "20 filters"),
        (None, "NoneType"),
        (torch.full((5, 20), 1.5), "a gate or an assignment"),
        (torch.full((5, 20), torch.nan), "entries in"),
        (torch.ones(4, 20), "num_classes=5"),
    ],
)
def test_what_does_not_fit_is_refused(matrix, message):
    _, features, targets = simulate()
    with pytest.raises(ValueError, match=message):
        verdict(matrix, features, targets, accuracy=0.9, removal=None)
