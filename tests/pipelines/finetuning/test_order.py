"""The number of a step alone decides its examples, in whole epochs, and its learning rate."""

from itertools import chain

import pytest

from dma_diffusers.pipelines.finetuning.order import Order
from dma_diffusers.pipelines.finetuning.trainer import Settings

LEVELS = [1.0] * 7 + [0.5] * 7


@pytest.mark.parametrize("by_level", [False, True])
def test_an_epoch_has_every_example_once_but_for_incomplete_batches(by_level):
    order = Order(LEVELS, 2, seed=3, by_level=by_level)
    epoch = list(chain.from_iterable(order[i] for i in range(order.per_epoch)))
    assert len(epoch) == len(set(epoch)) == (12 if by_level else 14)
    again = [order[i] for i in range(order.per_epoch, 2 * order.per_epoch)]
    assert again != [order[i] for i in range(order.per_epoch)]


def test_a_position_alone_says_its_batch():
    forwards = [Order(LEVELS, 3, seed=1)[i] for i in range(9)]
    one = Order(LEVELS, 3, seed=1)
    assert [one[i] for i in reversed(range(9))] == forwards[::-1]
    assert [Order(LEVELS, 3, seed=2)[i] for i in range(9)] != forwards


def test_batches_of_one_level_have_one_level():
    order = Order(LEVELS, 3, seed=0, by_level=True)
    for position in range(3 * order.per_epoch):
        assert len({LEVELS[example] for example in order[position]}) == 1


def test_fewer_examples_than_a_batch_are_repeated():
    assert sorted(Order([1.0, 1.0], 4, seed=0)[5]) == [0, 0, 1, 1]


def test_the_learning_rate_rises_stays_and_falls():
    settings = Settings(learning_rate=2.0, warmup=4, decay=0.25)
    rates = [settings.rate(step, 40) for step in range(40)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[30] == 2.0
    assert rates[35] == 1.0 and rates[39] == pytest.approx(0.2)
    assert Settings(learning_rate=2.0, warmup=4).rate(39, 40) == 2.0
