from tests.ntk import reference


def test_a():
    assert reference.x == 1
