"""The heads of a linear probe against Newton's method, on features of very different scales."""

import pytest
import torch

from cxr_vit.evaluation.metrics import evaluate
from cxr_vit.evaluation.probe import _Basis, _Descent, fit_heads, score_heads

UNKNOWN = -1.0


def problem(count=400, width=6, labels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    truth = torch.randn(width, labels, generator=generator)
    noise = torch.randn(count, labels, generator=generator)
    targets = (mixed @ truth * 0.3 + 2 * noise > 2).float()
    return mixed * torch.logspace(-2, 2, width) + 5, targets


def newton(features, labels, decay):
    """Return the solution for one label, `UNKNOWN` left out, as weights and bias of features."""
    exact = features.double()
    mean, std = exact.mean(0), exact.std(0, unbiased=False)
    known = labels != UNKNOWN
    design = torch.cat([(exact - mean) / std, torch.ones(len(exact), 1).double()], 1)[known]
    target, solution = labels[known].double(), torch.zeros(design.shape[1]).double()
    penalty = torch.full_like(solution, decay)
    penalty[-1] = 0
    for _ in range(30):
        probability = torch.sigmoid(design @ solution)
        gradient = design.T @ (probability - target) / len(target) + penalty * solution
        variance = probability * (1 - probability)
        hessian = (design * variance[:, None]).T @ design / len(target) + torch.diag(penalty)
        solution = solution - torch.linalg.solve(hessian, gradient)
    weight = solution[:-1] / std
    return weight, solution[-1] - mean @ weight


@pytest.mark.parametrize("masked", [False, True], ids=["all known", "a third unknown"])
def test_heads_equal_newtons_solution(masked):
    features, labels = problem()
    if masked:
        hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 1 / 3
        labels[hidden] = UNKNOWN
    decays = [1e-4, 1e-2, 1.0]
    fits = fit_heads(features, labels, weight_decays=decays, steps=2000)
    assert [fit.weight_decay for fit in fits] == decays
    assert all(fit.has_converged for fit in fits)
    names = ["a", "b", "c"]
    for fit in fits:
        solutions = [newton(features, column, fit.weight_decay) for column in labels.unbind(1)]
        weight = torch.stack([solution[0] for solution in solutions])
        bias = torch.stack([solution[1] for solution in solutions])
        # In units of the logits: the features' scales span four orders of magnitude.
        scale = features.double().std(0)
        assert ((fit.head.weight - weight) * scale).abs().max() < 1e-3
        logits = features.double() @ weight.T + bias
        assert (fit.head.logits(features) - logits).abs().max() < 1e-2
        own, exact = (
            evaluate(found, labels, names)["auroc_macro"]
            for found in (fit.head.logits(features), logits.float())
        )
        assert own == pytest.approx(exact, abs=1e-3)


def test_scores_equal_stored_ones_of_scikit_learn():
    # LogisticRegression(C=1 / (400 * decay), tol=1e-8) of scikit-learn 1.x on the standardised
    # features; AUROC of the same features.
    features, labels = problem()
    fits = fit_heads(features, labels, weight_decays=[1e-3, 1e-1], steps=2000)
    aurocs = [
        [evaluate(fit.head.logits(features), labels, list("abc"))["auroc"][name] for name in "abc"]
        for fit in fits
    ]
    assert aurocs == [pytest.approx(row, abs=1e-3) for row in SKLEARN]


SKLEARN = [[0.769788, 0.801961, 0.907820], [0.757286, 0.783424, 0.900127]]


def test_label_without_positives_keeps_the_prior():
    features, labels = problem()
    labels[:, 1] = 0
    labels[:, 2] = UNKNOWN
    (fit,) = fit_heads(features, labels, weight_decays=[1e-2], steps=2000)
    assert fit.has_converged
    assert torch.count_nonzero(fit.head.weight[0]) > 0
    assert torch.count_nonzero(fit.head.weight[1:]) == 0
    odds = torch.log(torch.tensor([0.5 / 400.5, 1.0]))  # half an image on either side
    assert torch.allclose(fit.head.bias[1:], odds, atol=1e-5)


def test_constant_features_and_few_images_are_no_problem():
    features, labels = problem(count=20, width=40)
    features[:, 3] = 7.0
    for fit in fit_heads(features, labels, weight_decays=[0.0, 1e-2], steps=50):
        assert fit.head.weight.isfinite().all()
        assert torch.count_nonzero(fit.head.weight[:, 3].abs() > 1e-4) == 0


def test_steps_limit_the_descent():
    features, labels = problem()
    (fit,) = fit_heads(features, labels, weight_decays=[1e-4], steps=2)
    assert fit.steps == 2
    assert not fit.has_converged


def test_undefined_validation_scores_stay_undefined():
    features, labels = problem(labels=1)
    fits = fit_heads(features, labels, weight_decays=[0.1], steps=100)
    (defined,) = score_heads(fits, features, labels, ["Mass"])
    (undefined,) = score_heads(fits, features, torch.zeros_like(labels), ["Mass"])
    assert defined.auroc > 0.5
    assert undefined.auroc is None


def test_gradient_is_that_of_the_returned_head():
    features, labels = problem()
    descent = _Descent(_Basis.of(features), labels, torch.tensor([1e-4, 1e-2]))
    taken, largest = descent.run(2000)
    assert taken < 2000
    of_weight, of_bias = descent.gradient(descent.weight, descent.bias)
    own = torch.maximum(of_weight.abs().amax(dim=(0, 2)), of_bias.abs().amax(dim=1))
    assert own.tolist() == largest
