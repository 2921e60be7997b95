"""Threads that share passes: who does what is settled before, so it is no matter who is first."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from distrl.models.crew import ALONE, LARGEST, Crew, Gradients, hand_over


@pytest.fixture
def crew():
    made = Crew(3)
    yield made
    made.close()


def test_answers_come_in_the_order_of_loads(crew):
    def slow_first(load):
        time.sleep(0.05 * (3 - load))
        return load, threading.current_thread().name

    answers = crew.run(slow_first, [0, 1, 2])
    assert [load for load, _ in answers] == [0, 1, 2]
    assert len({thread for _, thread in answers}) == 3, "each load has a thread of its own"


@pytest.mark.parametrize("size", [1, 3])
def test_members_compute_gradients_where_the_caller_does(size):
    crew, weight = Crew(size), torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not any(crew.run(lambda _: (weight * 2).requires_grad, [0, 1]))
    assert all(crew.run(lambda _: (weight * 2).requires_grad, [0, 1]))
    crew.close()


def test_an_error_is_raised_when_nobody_works_any_more(crew):
    done = []

    def work(load):
        if load == 1:
            raise ValueError("load 1")
        time.sleep(0.1)
        done.append(load)

    with pytest.raises(ValueError, match="load 1"):
        crew.run(work, [0, 1, 2])
    assert sorted(done) == [0, 2]


@pytest.mark.parametrize(
    ("cores", "size", "inner"), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (6, 3, 2), (8, 4, 2), (7, 1, 7)]
)
def test_a_crew_keeps_all_cores_busy(cores, size, inner):
    crew = Crew.of_cores(cores)
    assert (crew.size, torch.get_num_threads()) == (size, inner)
    assert crew.size <= LARGEST
    if crew.size > 1:
        assert crew.run(lambda _: torch.get_num_threads(), range(crew.size)) == [inner] * crew.size
    crew.close()


def test_gradients_are_those_of_autograd_to_the_bit_and_unused_weights_have_none():
    torch.manual_seed(0)
    used, unused = torch.randn(50, requires_grad=True), torch.randn(3, requires_grad=True)
    inputs = torch.randn(4, 50)

    def summed(apart):
        used.grad = None
        for x in inputs:
            found = Gradients([used, unused] if apart else None)
            found.backward((used * x).sin().sum())
            hand_over([found], ALONE)
        assert used.grad is not None
        return used.grad.clone()

    assert torch.equal(summed(apart=True), summed(apart=False))
    assert unused.grad is None


def test_several_ways_back_of_one_load_add_up():
    weight = torch.ones(2, requires_grad=True)
    found = Gradients([weight])
    found.backward(weight.sum())
    found.backward((3 * weight).sum())
    assert weight.grad is None, "nothing before it is handed over"
    hand_over([found], ALONE)
    hand_over([found], ALONE)
    assert weight.grad is not None and weight.grad.tolist() == [4, 4]


@pytest.mark.parametrize("shared", [lambda a, b: (a + b).sum(), lambda a, b: (a + b).sin().sum()])
def test_a_gradient_that_two_weights_share_is_theirs_apart(shared):
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    found = Gradients([a, b])
    found.backward(shared(a, b))
    hand_over([found], ALONE)
    assert a.grad is not None and b.grad is not None
    a.grad.mul_(5)
    assert b.grad.tolist() == [1, 1]


def test_threads_add_up_the_loads_of_all_weights_in_their_order():
    crew = Crew(2)
    weights = [torch.ones(3, requires_grad=True) for _ in range(5)]

    def work(scale):
        found = Gradients(weights)
        found.backward(scale * sum(place * weight.sum() for place, weight in enumerate(weights)))
        return found

    hand_over(crew.run(work, [1.0, 1e8, -1e8]), crew)
    crew.close()
    for place, weight in enumerate(weights):
        # In float32 the first is lost beside the second; from the last on it would be left over.
        assert weight.grad is not None and weight.grad.tolist() == [0.0] * 3, place


def test_a_gradient_is_kept_without_a_copy():
    weight = torch.ones(4, requires_grad=True)
    made = []
    weight.register_hook(made.append)
    found = Gradients([weight])
    found.backward((weight * torch.arange(4.0)).sum())
    hand_over([found], ALONE)
    assert weight.grad is not None and weight.grad.data_ptr() == made[0].data_ptr()


def test_a_gradient_lies_in_memory_as_its_weight_does():
    """Else a fused optimizer would give each number to another weight."""
    weight = torch.ones(2, 3, requires_grad=True)
    factors = torch.arange(6.0).view(3, 2)
    found = Gradients([weight])
    found.backward((weight.t() * factors).sum())
    hand_over([found], ALONE)
    assert weight.grad is not None and weight.grad.stride() == weight.stride()
    assert torch.equal(weight.grad, factors.t())


def test_one_thread_is_the_caller():
    assert ALONE.run(lambda _: threading.current_thread(), [0]) == [threading.current_thread()]
