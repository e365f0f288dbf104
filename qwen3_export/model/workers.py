"""Parallel work whose result does not depend on the number of threads.

Torch splits one operation over threads and may then add in another order. Here every operation runs
on one thread, and whole pieces of work, cut the same way on every machine, run side by side.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qwen3_export.core.memory import lacks_memory
from qwen3_export.core.process import keep_few_kernels, keep_freed_memory, sleeping_threads, uncollected, uninterrupted
from qwen3_export.core.processors import thread_count
from qwen3_export.errors import MissingRuntimeError
from qwen3_export.model.threads import Threads, ThreadsApart, results

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
# What one piece of shared work leaves: tensors, arrays, and values that JSON holds.
Parts = Mapping[str, Any]


class Workers:
    """A pool of threads; see `workers` and `workers_without_torch`.

    `matmul_dtype` is the type in which this processor multiplies fastest what need not be exact:
    calibration samples on their way through the model. `int_matmul`: integers are faster still, where
    weights are codes (`model.integer_linear`), and in the Gram sums of inputs (`calibration.gram_avx2`).
    """

    def __init__(self, threads: Threads, matmul_dtype: Any = None, int_matmul: bool = False) -> None:
        self.threads = threads
        self.matmul_dtype: torch.dtype = matmul_dtype
        self.int_matmul = int_matmul
        self._apart, self.seconds = threading.local(), dict[str, float]()

    @property
    def _pool(self) -> ThreadPoolExecutor | ThreadsApart:
        """All threads, or inside `map_apart` those of one item."""
        return getattr(self._apart, "part", self.threads.pool)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the order of the items.

        The first exception is raised, the rest is cancelled.
        """
        return results([self._pool.submit(function, item) for item in items])

    def start(self, function: Callable[[], Result]) -> Future[Result]:
        """One piece of work beside what follows.

        It must not wait for the pool itself.
        """
        return self._pool.submit(function)

    def map_apart(self, function: Callable[[Item], Result], items: Sequence[Item], at_once: int) -> list[Result]:
        """As `map`, for items that ask this pool for work of their own.

        `at_once` items are worked on side by side. Each has an equal part of the threads.
        """
        beside = min(at_once, self.threads.count, len(items))
        if beside < 2 or hasattr(self._apart, "part"):
            return [function(item) for item in items]
        stop, around = threading.Event(), self._around
        with ExitStack() as stack:
            parts = [ThreadsApart.of(self.threads, self.threads.count // beside, stop, stack) for _ in range(beside)]

            def begin() -> None:
                self.threads.prepare()
                self._apart.part, self._apart.label = parts.pop(), around

            with ThreadPoolExecutor(beside, initializer=begin) as pool:
                return results([pool.submit(function, item) for item in items], stop)

    @property
    def is_shared(self) -> bool:
        """Whether other processes have a part in `share`."""
        return False

    def share(
        self, label: str, items: Sequence[Item], work: Callable[[Sequence[Item]], None],
        dump: Callable[[Item], Parts], load: Callable[[Item, Parts], None], evenly: bool = False,
    ) -> None:  # fmt: skip
        """Have `work` done on all items: here, or by workers on a cluster.

        Items are cut by constants. `dump` says what the work on an item has left, `load` puts in place what another
        process gave. `evenly`: an equal share at once, where each call of `work` costs something of its own.
        """
        with self.timed(label):
            work(items)

    @property
    def _around(self) -> str:
        """Labels of this thread's work, each with a slash behind it."""
        found: str = getattr(self._apart, "label", "")
        return found

    @contextmanager
    def timed(self, label: str) -> Iterator[None]:
        """Add the seconds of a `with` block to `seconds`.

        Its key is the label behind those of the work that it is part of. Threads side by side each add theirs.
        """
        around = self._around
        self._apart.label, started = f"{around}{label}/", time.perf_counter()
        try:
            yield
        finally:
            self._apart.label, path = around, around + label
            self.seconds[path] = self.seconds.get(path, 0.0) + time.perf_counter() - started

    def barrier(self) -> None:
        """Wait until all processes that share work have come here."""

    def share_map(self, label: str, function: Callable[[Item], Any], items: Sequence[Item]) -> list[Any]:
        """As `map`, on a cluster too.

        The results are tensors, numbers, or tuples of numbers.
        """
        found: dict[int, Any] = {}

        def work(places: Sequence[int]) -> None:
            found.update(zip(places, self.map(function, [items[place] for place in places]), strict=True))

        def load(place: int, parts: Parts) -> None:
            found[place] = parts["result"]

        self.share(label, range(len(items)), work, lambda place: {"result": found[place]}, load)
        return [found[place] for place in range(len(items))]


# Largest error of a product that `fast` accepts, relative to its largest element; fp32 itself has about 4e-7.
FAST_BOUND = 4e-6


def import_torch() -> None:
    """Import torch, which takes a second and must not meet Ctrl-C.

    Raises MissingRuntimeError where it is not installed.
    """
    try:
        with uninterrupted(), uncollected(), sleeping_threads():
            import torch  # noqa: F401  (asked for here, so that its absence is a clear error)
    except ImportError as error:
        if lacks_memory(error):
            raise
        raise MissingRuntimeError("quantizing needs torch", "pip install 'qwen3-export[solve]'") from error


@contextmanager
def workers_without_torch(threads: int | None = None) -> Iterator[Workers]:
    """A pool of threads for work without torch.

    `threads` is by default as many as the processors that this process may use.
    """
    keep_freed_memory()
    with ThreadPoolExecutor(thread_count(threads)) as pool:
        yield Workers(Threads(pool, thread_count(threads)))


@contextmanager
def workers(threads: int | None = None, fast: bool = False) -> Iterator[Workers]:
    """A pool of threads where torch records no gradients.

    `threads` is by default as many as the processors that this process may use.

    `fast` lets fp32 products be computed as sums of bf16 products where the processor does those
    faster and the result stays within `FAST_BOUND`, which is tried out first.
    """
    keep_few_kernels()
    import torch

    def prepare() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    precision = matmul.fp32_precision if matmul else None
    if fast and matmul:
        matmul.fp32_precision = "bf16"
        if _product_error() > FAST_BOUND:
            matmul.fp32_precision = precision
    keep_freed_memory()
    try:
        with ThreadPoolExecutor(thread_count(threads), initializer=prepare) as pool:
            kind = fast_matmul() if fast else "fp32"
            dtype = torch.bfloat16 if kind == "bf16" else torch.float32
            yield Workers(Threads(pool, thread_count(threads), prepare), dtype, kind == "integers")
    finally:
        torch.set_num_threads(before)
        if matmul:
            matmul.fp32_precision = precision


def has_bf16() -> bool:
    """Whether this processor has instructions that multiply bf16 numbers and add up in fp32."""
    import torch

    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))


def has_fast_int_matmul() -> bool:
    """Whether AVX2 multiplies integers faster than fp32 numbers here.

    With AVX-512 fp32 is as fast.
    """
    import torch

    known = torch.cpu.get_capabilities()
    return bool(known.get("avx2")) and not known.get("avx512_f")


def fast_matmul() -> str:
    """In what `fast` workers multiply calibration samples: `bf16`, `integers` or `fp32`.

    It decides the bytes.
    """
    if has_bf16():
        return "bf16"
    return "integers" if has_fast_int_matmul() else "fp32"


def _product_error() -> float:
    """Largest error of a product, relative to its largest element."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 1024, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    return float((left @ right.T - exact).abs().max() / exact.abs().max())
