"""Threads that share passes: who does what is settled before, so it is no matter who is first."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from distrl.models.crew import ALONE, LARGEST, Crew, Gradients


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
            found.hand_over()
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
    found.hand_over()
    found.hand_over()
    assert weight.grad is not None and weight.grad.tolist() == [4, 4]


def test_a_gradient_that_two_weights_share_is_theirs_apart():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found = Gradients([a, b])
    found.backward((a + b).sum())
    found.hand_over()
    assert a.grad is not None and b.grad is not None
    a.grad.mul_(5)
    assert b.grad.tolist() == [1, 1]


def test_one_thread_is_the_caller():
    assert ALONE.run(lambda _: threading.current_thread(), [0]) == [threading.current_thread()]
