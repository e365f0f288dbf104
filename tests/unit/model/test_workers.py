"""Work side by side in the pool of threads."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch

from qwen3_export.model.workers import Workers, workers, workers_without_torch


def _sum_of_squares(pool: Workers, count: int) -> int:
    return sum(pool.map(lambda number: number * number, range(count)))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_work_apart_gives_the_results_in_order(threads: int, at_once: int) -> None:
    with workers_without_torch(threads) as pool:
        assert pool.map_apart(lambda count: _sum_of_squares(pool, count), range(6), at_once) == [0, 0, 1, 5, 14, 30]


def test_as_many_items_are_worked_on_as_asked_for() -> None:
    together, most, lock = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.02)
        with lock:
            together -= 1

    with workers_without_torch(4) as pool:
        pool.map_apart(work, range(12), 3)
        assert most == 3
        most = 0
        pool.map_apart(work, range(3), 1)
        assert most == 1


def test_an_item_has_its_own_part_of_the_threads() -> None:
    """Two items on four threads: each maps over two threads, and neither waits for the other's."""
    meet = threading.Barrier(4, timeout=10)

    def wait(_: int) -> str:
        meet.wait()
        return threading.current_thread().name

    with workers_without_torch(4) as pool:
        names = pool.map_apart(lambda _: pool.map(wait, range(2)), range(2), 2)
    assert len({name for pair in names for name in pair}) == 4


def test_work_apart_inside_work_apart_goes_on_in_its_thread() -> None:
    def outer(number: int) -> list[int]:
        return pool.map_apart(lambda other: 10 * number + other, range(2), 2)

    with workers_without_torch(2) as pool:
        assert pool.map_apart(outer, range(2), 2) == [[0, 1], [10, 11]]


def test_the_first_error_stops_what_has_not_begun() -> None:
    begun = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ValueError("the first")
        time.sleep(0.1)
        pool.map(begun.append, [100 + number])

    with workers_without_torch(2) as pool, pytest.raises(ValueError, match="the first"):
        pool.map_apart(work, range(20), 2)
    assert len(begun) < 5
    assert not [number for number in begun if number >= 100]


def test_work_that_was_stopped_says_so() -> None:
    found: list[BaseException] = []

    def work(number: int) -> None:
        if number == 0:
            time.sleep(0.05)
            raise KeyboardInterrupt
        try:
            for _ in range(100):
                pool.map(time.sleep, [0.01])
        except BaseException as error:
            found.append(error)
            raise

    with workers_without_torch(2) as pool, pytest.raises(KeyboardInterrupt):
        pool.map_apart(work, range(2), 2)
    assert [type(error) for error in found] == [CancelledError]


def test_torch_records_no_gradients_and_uses_one_thread_apart() -> None:
    def state(_: int) -> tuple[bool, int]:
        return torch.is_grad_enabled(), torch.get_num_threads()

    with workers(4) as pool:
        assert pool.map_apart(state, range(4), 4) == [(False, 1)] * 4
        assert pool.map_apart(lambda _: pool.map(state, range(2)), range(2), 2) == [[(False, 1)] * 2] * 2
