import pytest

from natgrad.experiments.config import FULL_BATCH_TRAIN_SAMPLES, CompareConfig, ConfigError
from natgrad.experiments.methods import METHODS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "imagenet"}, "Unknown data set 'imagenet': choose one of digits, mnist"),
        ({"model": "vit"}, "Unknown model"),
        ({"loss": "hinge"}, "Unknown loss"),
        ({"methods": ("sgd", "adam")}, "Unknown method 'adam'"),
        ({"methods": ()}, "At least one method"),
        ({"methods": ("sgd", "sgd")}, "only once"),
        ({"fisher": "true"}, "Unknown Fisher type"),
        ({"steps": 0}, "steps must be greater than 0"),
        ({"depth": -1}, "depth"),
        ({"width": 0}, "width"),
        ({"batch_size": 0}, "batch size"),
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"target_loss": 0.0}, "target loss"),
        ({"learning_rates": {"kfac": float("inf")}}, "learning rate of kfac"),
        ({"learning_rates": {"adam": 1.0}}, "Unknown method"),
        ({"model": "cnn", "depth": 1, "methods": ("sgd",)}, "depth of at least 2"),
        ({"device": "abacus"}, "not available"),
        ({"dtype": "float16"}, "floating-point type"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CompareConfig(**options)


@pytest.mark.parametrize("depth", [2, 5, 8])
def test_depths_that_make_the_tridiagonal_form_singular_are_refused(depth):
    with pytest.raises(ConfigError, match=f"singular for {depth} .* --depth {depth + 1}"):
        CompareConfig(depth=depth)
    others = tuple(name for name in METHODS if name != "block-tridiagonal")
    assert CompareConfig(depth=depth, methods=others).depth == depth


def test_full_batches_use_a_part_of_the_data_by_default():
    assert CompareConfig().effective_train_samples == FULL_BATCH_TRAIN_SAMPLES
    assert CompareConfig(batch_size=32).effective_train_samples is None
    assert CompareConfig(train_samples=50, batch_size=32).effective_train_samples == 50
