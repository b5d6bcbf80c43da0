"""Built-in tasks without a run: which losses fit them, with which arguments and targets, and what is measured."""

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncnorm.errors import ConfigError
from syncnorm.train.config.schema import TaskSection
from syncnorm.train.task.builtin import TASKS, make_builtin
from syncnorm.train.task.make import make_task
from syncnorm.train.task.supervised import Classify, Regress


def measured(task: Any, outputs: Any, targets: Any) -> dict[str, float]:
    batch = torch.zeros(len(outputs), 1), torch.tensor(targets)
    shares = task.metrics(lambda x: torch.tensor(outputs), batch)
    return {name: float(total) / float(count) for name, (total, count) in shares.items()}


OF_LOGITS = (None, "BCEWithLogitsLoss", "MultiLabelSoftMarginLoss", "SoftMarginLoss")
LABELS, PROBABILITIES = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[0.9, 0.4, 0.1], [0.3, 0.6, 0.7]]


@pytest.mark.parametrize("loss", [None, *TASKS["multilabel"].losses])
def test_labels_are_found_where_the_loss_has_its_threshold(loss):
    """Those of probabilities at 0.5, those of logits at 0."""
    task: Any = make_builtin("multilabel", loss, {})
    shift = 0.5 if loss in OF_LOGITS else 0.0
    outputs = [[value - shift for value in row] for row in PROBABILITIES]
    found = measured(task, outputs, LABELS)
    assert (found["f1"], found["exact_match"]) == (1, 1)
    outputs[1][0] = 0.6 - shift
    found = measured(task, outputs, LABELS)
    assert (found["f1"], found["exact_match"]) == (6 / 7, 0.5)


def test_the_margin_of_a_label_that_is_not_there_counts():
    """SoftMarginLoss has -1 for it: with 0 such an output would have no gradient."""
    for targets in (LABELS, [[2 * value - 1 for value in row] for row in LABELS]):
        task: Any = make_builtin("multilabel", "SoftMarginLoss", {})
        signs = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]])
        expected = nn.SoftMarginLoss()(torch.tensor(PROBABILITIES), signs)
        assert measured(task, PROBABILITIES, targets)["loss"] == pytest.approx(float(expected))
        assert task.labels(torch.tensor(targets)).tolist() == LABELS


@pytest.mark.parametrize(
    ("loss", "options", "outputs"),
    [
        ("PoissonNLLLoss", {}, [0.0, 1.0, 2.0]),
        ("PoissonNLLLoss", {"log_input": False}, [math.exp(n) for n in range(3)]),
        ("MSELoss", {}, [math.exp(n) for n in range(3)]),
    ],
)
def test_values_are_measured_as_the_loss_has_them(loss, options, outputs):
    task: Any = make_builtin("regress", loss, options)
    found = measured(task, outputs, [math.exp(n) + 0.5 for n in range(3)])
    assert found["mean_absolute_error"] == pytest.approx(0.5)
    assert found["mean_squared_error"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        ("CrossEntropyLoss", [math.log(0.2) + 1, math.log(0.8) + 1]),
        ("NLLLoss", [math.log(0.2), math.log(0.8)]),
        ("BCELoss", [0.2, 0.8]),
        ("BCEWithLogitsLoss", [math.log(0.2 / 0.8), math.log(0.8 / 0.2)]),
        ("MSELoss", [0.2, 0.8]),
    ],
)
def test_probabilities_of_classes_are_read_as_the_loss_has_them(loss, outputs):
    task: Any = make_builtin("classify", loss, {})
    found = task.read(torch.tensor([outputs]))
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.8]]))


@pytest.mark.parametrize(
    ("task", "loss"),
    [(task, loss) for task in TASKS if task != "own_loss" for loss in TASKS[task].losses],
)
def test_every_loss_that_is_offered_fits_its_task(task, loss):
    """Its sum over its count is torch's mean, and the shares of two workers add up to it."""
    made: Any = make_builtin(task, loss, {})
    torch.manual_seed(0)
    inputs = torch.rand(6, 3, 4) if task == "segment" else torch.rand(6, 3)
    by_class = loss in ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss")
    targets = torch.randint(0, 3, (6, *inputs.shape[2:])) if by_class else (inputs > 0.4).float()
    if loss == "SoftMarginLoss":
        targets = 2 * targets - 1
    expected = getattr(nn, loss)()(inputs, targets)
    parts = [
        made.loss(lambda x: x, (inputs[some], targets[some])) for some in (slice(4), slice(4, 6))
    ]
    (first, count), (second, other) = parts
    torch.testing.assert_close((first + second) / (count + other), expected)
    made.metrics(lambda x: x, (inputs, targets))


@pytest.mark.parametrize(
    ("task", "loss", "outputs", "targets", "words"),
    [
        (
            "classify",
            "BCELoss",
            (4, 3),
            (4,),
            "must give class probabilities (N, K) for task.loss BCE",
        ),
        (
            "classify",
            "NLLLoss",
            (4, 3),
            (4, 3),
            "must give classes (N,) for task.loss NLLLoss, got",
        ),
        ("classify", None, (4, 5), (4, 3), "got shape (4, 5) for 4 samples of 3 classes"),
        (
            "multilabel",
            None,
            (4,),
            (4,),
            "must give labels (N, K) for task.name multilabel, got (4,)",
        ),
    ],
)
def test_targets_that_a_loss_does_not_take(task, loss, outputs, targets, words):
    dtype = torch.int64 if task == "classify" and len(targets) == 1 else torch.float32
    batch = torch.zeros(4, 1), torch.zeros(targets, dtype=dtype)
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_builtin(task, loss, {}).loss(lambda x: torch.zeros(outputs), batch)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "own_loss"])
def test_a_loss_that_does_not_suit_the_task_is_refused(task):
    """MultiLabelMarginLoss tells labels from each other alone: there is no threshold."""
    for loss in ("MultiLabelMarginLoss", "CTCLoss", ""):
        with pytest.raises(ValueError, match=f"must be one of .* for this task, got '{loss}'"):
            make_builtin(task, loss, {})


@pytest.mark.parametrize(
    ("name", "loss", "options", "message"),
    [
        *(
            (
                "classify",
                None,
                {"weight": bad},
                r"options must hold numbers >= 0, not all 0, .*weight",
            )
            for bad in ([1, "nan", 2], [1, None], [1, math.inf], [1, [2]], [0, 0], [1, -1], [])
        ),
        ("multilabel", None, {"pos_weight": [1, None]}, "options must hold numbers .*pos_weight"),
        ("classify", None, {"weight": 3}, "options must suit CrossEntropyLoss: "),
        ("classify", None, {"label_smoothing": 2}, "suit CrossEntropyLoss: .* between 0.0 and 1.0"),
        ("classify", None, {"label_smoothing": "abc"}, "CrossEntropyLoss: .*'label_smoothing'"),
        (
            "segment",
            "NLLLoss",
            {"ignore_index": 1.5},
            "options must suit NLLLoss: .*'ignore_index'",
        ),
        ("classify", "MultiMarginLoss", {"p": 3}, "options must suit MultiMarginLoss: .*p"),
        ("regress", "HuberLoss", {"delta": -1}, "options must suit HuberLoss: .*delta"),
        ("regress", "SmoothL1Loss", {"beta": -1}, "options must suit SmoothL1Loss: .*beta"),
    ],
)
def test_arguments_that_a_loss_does_not_take_are_refused_before_anything_starts(
    name, loss, options, message
):
    with pytest.raises(ValueError, match=message):
        make_builtin(name, loss, options)


@pytest.mark.parametrize(
    ("name", "loss", "options"),
    [(name, loss, {}) for name, task in TASKS.items() if name != "own_loss" for loss in task.losses]
    + [
        ("classify", "CrossEntropyLoss", {"weight": [1, 0, 2], "ignore_index": -1}),
        ("classify", "MultiMarginLoss", {"weight": [1, 2, 3], "p": 2}),
        ("multilabel", "BCEWithLogitsLoss", {"pos_weight": [1, 2, 3], "weight": [1.0]}),
        ("regress", "PoissonNLLLoss", {"log_input": False, "full": True}),
    ],
    ids=str,
)
def test_arguments_that_a_loss_takes(name, loss, options):
    made: Any = make_builtin(name, loss, options)
    assert type(made.criterion).__name__ == loss


def test_a_weight_for_each_output():
    task = make_task(
        TaskSection(name="classify", options={"weight": [0.1, 0.7]}),
        torch.device("cpu"),
        torch.float64,
    )
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    total, count = task.loss(nn.Identity(), (x, y))
    expected = F.cross_entropy(x, y, weight=torch.tensor([0.1, 0.7], dtype=torch.float64))
    torch.testing.assert_close(total / count, expected, rtol=1e-15, atol=0)
    with pytest.raises(ConfigError, match=r"`task.options.weight` must .* 3 outputs, got 2"):
        task.loss(nn.Identity(), (torch.randn(4, 3), y))
    one: Any = make_builtin("classify", None, {"weight": [1.0]})
    with pytest.raises(ConfigError, match=r"`task.options.weight` must .* 3 outputs, got 1"):
        one.loss(nn.Identity(), (torch.randn(4, 3), y))


def test_ignored_samples_count_in_no_figure():
    outputs, targets = torch.randn(6, 3), torch.tensor([0, 1, -100, 2, -100, 0])
    found = Classify(None).metrics(nn.Identity(), (outputs, targets))
    kept = targets >= 0
    right = int((outputs.argmax(1) == targets)[kept].sum())
    assert [int(each) for each in found["accuracy"]] == [right, 4]
    assert int(found["loss"][1]) == 4


@pytest.mark.parametrize("ignored", [-100, 0, 255])
def test_an_ignored_class_has_no_part_in_the_mean_over_classes(ignored):
    task = make_builtin("segment", None, {"ignore_index": ignored})
    targets = torch.tensor([[0, 1, 1, 2, 2, 2]])
    found = torch.tensor([[1, 1, 0, 2, 2, 1]])
    outputs = F.one_hot(found, 3).movedim(-1, 1).float()
    hits, unions = task.measure(outputs, targets)["mean_iou"]
    # Of class 0 the first pixel is counted, and the third one's prediction, or neither.
    expected = ([1, 2], [3, 3]) if ignored == 0 else ([0, 1, 2], [2, 4, 3])
    is_there = unions > 0
    assert (hits[is_there].tolist(), unions[is_there].tolist()) == expected


def test_class_probabilities_have_no_ignored_class():
    task: Any = make_builtin("classify", None, {"ignore_index": 0})
    probabilities = torch.full((4, 3), 1 / 3)
    with pytest.raises(ConfigError, match=r"`task.options.ignore_index` must be less than 0 for"):
        task.loss(nn.Identity(), (torch.randn(4, 3), probabilities))


@pytest.mark.parametrize("name", ["classify", "segment"])
def test_classes_may_be_any_whole_numbers(name):
    """Some of torch's losses take int64 alone; numpy's whole numbers are often others."""
    logits = torch.randn(4, 3) if name == "classify" else torch.randn(4, 3, 2, 2)
    found = []
    for dtype in (torch.int64, torch.uint8, torch.int8, torch.int16, torch.int32):
        classes = torch.ones(logits[:, 0].shape, dtype=dtype)
        task, batch = make_builtin(name, None, {}), (torch.zeros(4, 1), classes)
        shares = [
            task.loss(lambda x: logits, batch),
            *task.metrics(lambda x: logits, batch).values(),
        ]
        found.append([torch.as_tensor(each).tolist() for share in shares for each in share])
    assert all(each == found[0] for each in found)


def test_yes_and_no_are_no_classes():
    with pytest.raises(ConfigError, match=r"whole numbers, or .* got \(4,\) of torch.bool"):
        Classify(None).loss(nn.Identity(), (torch.randn(4, 2), torch.ones(4) > 0))


class _WithAFunction(Regress):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = partial(F.mse_loss, reduction="sum")


def test_a_subclass_may_have_a_function_for_its_criterion():
    x, y = torch.randn(4, 2), torch.randn(4, 2)
    total, count = _WithAFunction().loss(nn.Identity(), (x, y))
    torch.testing.assert_close(total / count, F.mse_loss(x, y))
