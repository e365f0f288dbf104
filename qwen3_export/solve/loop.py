"""The steps of a quantization run: embedding, blocks, head.

Every step's files are on the disk before it counts as done. Modules that run the model are imported only where they are
needed, since rounding to nearest does without torch (`blocks.rtn_without_torch`).
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from qwen3_export.core.process import trim_heap
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.recipe import Recipe
from qwen3_export.solve.executor import PIECES, Executor, Local
from qwen3_export.solve.job import Job, QuantizeSettings, SolvedLinear
from qwen3_export.solve.output_folder import QuantizedFolder
from qwen3_export.solve.preflight import check_peak_memory
from qwen3_export.solve.record import record_linears
from qwen3_export.solve.scratch import check_activations


def _with_fisher(job: Job, seed: int, resumed: int, progress: Progress) -> Job:
    """The job with the outputs' Fisher information, if its method needs it.

    It is measured, or taken over from an earlier run.
    """
    count, layers = job.method.fisher_samples(job.options), job.checkpoint.config.num_layers
    if not count or job.samples is None or resumed == layers:
        return job
    with progress.bar("measure which outputs matter", 2 * layers) as tick, job.pool.timed("outputs"):
        from qwen3_export.solve.calibration.fisher import measure_fisher

        found = measure_fisher(job.checkpoint, job.samples, count, seed, job.pool, job.scratch, job.device, tick)
    return replace(job, fisher=found)


def run_blocks(
    job: Job, target: QuantizedFolder, settings: QuantizeSettings, progress: Progress, executor: Executor | None = None
) -> tuple[dict[str, Any], int]:
    """Solve all steps that are not done yet, by `executor` or in this process.

    Returns the records of blocks, embedding and head, and the number of blocks that were done before.
    """
    found = target.resume()
    blocks, resumed, layers = found["blocks"], len(found["blocks"]), job.checkpoint.config.num_layers
    if executor is None:
        # This process cannot use the pieces that workers of a cluster have left of an unfinished block.
        shutil.rmtree(target.scratch / PIECES, ignore_errors=True)
    if job.samples is not None and executor is None:
        from qwen3_export.solve.calibration.activations import SpareFiles

        job = replace(job, spare_files=SpareFiles(target.scratch / "spare"))
    if 0 < resumed < layers:
        check_activations(job, resumed)
    executor = executor or Local()
    if resumed:
        progress.note(f"resuming at block {min(resumed + 1, layers)} of {layers}")
    with ThreadPoolExecutor(1) as writer:
        job = _with_fisher(job, settings.seed, resumed, progress)
        written = None if blocks else _start(job, target, found, writer, progress)
        with progress.bar(f"quantize {job.checkpoint.name} ({job.recipe.name})", layers + target.head_apart) as tick:
            for layer in range(layers):
                if layer >= resumed:
                    solved = executor.solve(job, layer)
                    if written is not None:
                        written.result()
                    linears = record_linears(job.recipe, solved.linears, progress)
                    blocks.append({"linears": linears, "expert_tokens": list(solved.expert_tokens)})
                    done = {**found, "blocks": list(blocks)}
                    written = writer.submit(_keep_block, job, target, layer, done, executor)
                    if job.samples is not None:
                        # Not in parallel: hidden states before and after a block would be on the disk together for too
                        # long.
                        written.result()
                    check_peak_memory(settings.memory)
                tick()
            if written is not None:
                written.result()
            if target.head_apart:
                _finish_head(job, target, found, progress)
                check_peak_memory(settings.memory)
                tick()
    return found, resumed


def _start(
    job: Job, target: QuantizedFolder, found: dict[str, Any], writer: ThreadPoolExecutor, progress: Progress
) -> Future[None]:
    """Quantize the embedding if asked, and write the hidden states before block 0.

    The first shard is still being written when the function returns.
    """
    embedding = None
    if job.recipe.scheme_for(EMBEDDING) is not None:
        from qwen3_export.solve.blocks.embeddings import solve_embedding

        with progress.bar("quantize the embedding", job.checkpoint.config.num_layers) as tick:
            embedding = solve_embedding(job, tick)
    found["outer"].update(_outer_result(job.recipe, embedding, progress))
    written = writer.submit(target.write_outer, embedding)
    if job.samples is not None:
        from qwen3_export.solve.blocks.block import embed_samples

        embed_samples(job, embedding.solved.tensor if embedding else None)
    return written


def _finish_head(job: Job, target: QuantizedFolder, found: dict[str, Any], progress: Progress) -> None:
    """Quantize an untied head, as the last step."""
    if HEAD in found["outer"]:
        return
    from qwen3_export.solve.blocks.head import solve_head

    head = solve_head(job)
    assert head is not None
    target.write_head(head)
    found["outer"].update(_outer_result(job.recipe, head.linears[HEAD], progress))
    target.save_progress(found)


def _outer_result(recipe: Recipe, linear: SolvedLinear | None, progress: Progress) -> dict[str, Any]:
    return {} if linear is None else record_linears(recipe, {linear.solved.tensor.name: linear.record}, progress)


def _keep_block(job: Job, target: QuantizedFolder, layer: int, done: dict[str, Any], executor: Executor) -> None:
    """Write a block to the disk, then record it as done.

    Meanwhile the next block may be solved.
    """
    executor.write(job, target, layer)
    target.save_progress(done)
    executor.written(layer)
    if job.samples is not None:
        from qwen3_export.solve.blocks.block import drop_hidden

        drop_hidden(job, layer)
        # Moments and states of many sizes leave holes in the heap; rounding alone uses the same few sizes again.
        trim_heap()
